"""A checkpoint's components as ONNX files with their weights beside them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from exporters import components
from exporters.bind import WeightFolder, bind, check_weights
from exporters.chain import Chain
from exporters.checkpoint import Checkpoint, Weights
from exporters.trace import trace_chain
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.errors import ExportError
from fluxdeploy.progress import Progress

__all__ = ["COMPONENTS", "Exported", "component_precision", "component_source", "export_component"]

COMPONENTS = ("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder")
"""The components of a bundle, in the order in which a picture passes them."""

# T5 and the VAE overflow FP16; bfloat16 has float32's range.
_BESIDE_FP16 = {"t5": "bf16", "vae_decoder": "bf16", "vae_encoder": "bf16"}

_INLINE_LIMIT = 1 << 20
"""Bytes of constants in a graph: masks and indices, never weights."""


@dataclass(frozen=True)
class Exported:
    """An exported component: its graph, the weight files it needs, and its chain.

    `path` and `weights` are relative to the folder of the export.
    """

    chain: Chain
    precision: str
    path: str
    weights: tuple[str, ...]


def component_precision(name: str, precision: str) -> str:
    """The precision of a component where the transformer's is `precision`."""
    return _BESIDE_FP16.get(name, precision) if precision == "fp16" else precision


def component_source(
    checkpoint: Checkpoint, name: str, precision: str, split: bool = True
) -> tuple[Chain, Weights]:
    """A component's chain, and the tensors that it takes its weights from."""
    if precision not in components.PRECISIONS:
        allowed = ", ".join(components.PRECISIONS)
        raise ExportError(f"Precision {precision!r} is not exported; {allowed} are.")
    how = components.PRECISIONS[precision]
    if name in ("transformer", "conditioner"):
        build = {
            "conditioner": components.conditioner_chain,
            "transformer": (components.transformer_chain if split else components.one_piece_chain),
        }[name]
        chain = build(checkpoint.transformer, how)
        return chain, checkpoint.part("transformer").weights
    if name == "clip":
        return components.clip_chain(checkpoint.clip, how), checkpoint.part("clip").weights
    if name == "t5":
        return components.t5_chain(checkpoint.t5, how), checkpoint.part("t5").weights
    if name in ("vae_decoder", "vae_encoder"):
        build_vae = getattr(components, f"{name}_chain")
        return build_vae(checkpoint.vae, how), checkpoint.part("vae").weights
    raise ExportError(f"There is no component {name!r}; there are {', '.join(COMPONENTS)}.")


def export_component(
    checkpoint: Checkpoint,
    name: str,
    precision: str,
    folder: WeightFolder,
    split: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Trace a component, bind its weights and write `<name>.onnx` beside the weight folder.

    With `split=False` the transformer is the one-piece model.

    Raises `CheckpointError` for weights that do not fit, `ExportError` for a graph that fails the
    checks, `BundleError` where the disk refuses.
    """
    chain, weights = component_source(checkpoint, name, precision, split)
    check_weights(chain, weights)
    folder.make()
    progress = progress or Progress(quiet=True)
    task = progress.task(f"  {name}: tracing ({precision})")
    model = trace_chain(chain)
    task.finish()
    converted = f"{name}.{precision}.safetensors"
    files = bind(
        model,
        len(chain.inputs),
        weights,
        folder,
        converted,
        lambda total: progress.task(f"  {name}: weights", total).advance,
    )
    proto = ir.to_proto(model)
    _check(proto, name)
    path = folder.root.parent / f"{name}.onnx"
    write_atomic(path, proto.SerializeToString(deterministic=True))
    return Exported(
        chain, precision, path.name, tuple(f"{folder.root.name}/{file}" for file in files)
    )


def _check(proto: onnx.ModelProto, name: str) -> None:
    """Refuse a graph that is not clean: invalid, with sequences, or with weights inside."""
    sequences = sorted({n.op_type for n in proto.graph.node if "Sequence" in n.op_type})
    if sequences:
        raise ExportError(
            f"The exported {name} holds {', '.join(sequences)}, which no engine runs."
        )
    # The checker follows external data and refuses hard links: it sees the weights as inputs.
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.initializer[:]
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            bare.graph.initializer.append(tensor)
    inline = sum(tensor.ByteSize() for tensor in bare.graph.initializer)
    if inline > _INLINE_LIMIT:
        raise ExportError(f"The exported {name} holds {inline} bytes of weights in its graph.")
    try:
        onnx.checker.check_model(bare, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exported {name} is not valid ONNX: {error}") from error
