"""A checkpoint's components as ONNX files with their weights beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from exporters.checkpoint import Checkpoint, Weights
from exporters.components import chains
from exporters.components.chain import Chain
from exporters.components.policy import is_quantized
from exporters.components.precisions import check_precision
from exporters.graph.fuse import fuse_attention
from exporters.graph.quantize import quantize
from exporters.graph.trace import trace_chain
from exporters.weights.bind import NO_LEDGER, Ledger, WeightFolder, bind, check_weights
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.calibrate.ranges import ActivationRanges

__all__ = ["COMPONENTS", "Exported", "component_source", "export_component"]

COMPONENTS = ("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder")
"""The components of a bundle, in the order in which a picture passes them."""

_INLINE_LIMIT = 1 << 20
"""Bytes of constants in a graph: masks and indices, never weights."""


@dataclass(frozen=True)
class Exported:
    """An exported component: its graph, the weight files it needs, and its chain.

    `path` and `weights` are relative to the folder of the export. `quantized` counts the linears
    whose weights are in 8 bits, `attentions` the softmaxes, and `weight_bytes` what all weights
    take in the types that the graph has them in.
    """

    chain: Chain
    precision: str
    path: str
    weights: tuple[str, ...]
    quantized: int
    attentions: int
    weight_bytes: int


def component_source(
    checkpoint: Checkpoint, name: str, compute: str, split: bool = True
) -> tuple[Chain, Weights]:
    """A component's chain, and the tensors that it takes its weights from.

    `compute` is what the chain computes in, before anything of it is quantized.
    """
    if compute not in chains.PRECISIONS:
        allowed = ", ".join(chains.PRECISIONS)
        raise ExportError(f"Precision {compute!r} is not exported; {allowed} are.")
    how = chains.PRECISIONS[compute]
    if name in ("transformer", "conditioner"):
        build = {
            "conditioner": chains.conditioner_chain,
            "transformer": (chains.transformer_chain if split else chains.one_piece_chain),
        }[name]
        chain = build(checkpoint.transformer, how)
        return chain, checkpoint.part("transformer").weights
    if name == "clip":
        return chains.clip_chain(checkpoint.clip, how), checkpoint.part("clip").weights
    if name == "t5":
        return chains.t5_chain(checkpoint.t5, how), checkpoint.part("t5").weights
    if name in ("vae_decoder", "vae_encoder"):
        build_vae = getattr(chains, f"{name}_chain")
        return build_vae(checkpoint.vae, how), checkpoint.part("vae").weights
    raise ExportError(f"There is no component {name!r}; there are {', '.join(COMPONENTS)}.")


def export_component(
    checkpoint: Checkpoint,
    name: str,
    precision: str,
    folder: WeightFolder,
    compute: str = "bf16",
    ranges: ActivationRanges | None = None,
    split: bool = True,
    fused: bool = False,
    progress: Progress | None = None,
    ledger: Ledger = NO_LEDGER,
) -> Exported:
    """Trace a component, bind its weights and write `<name>.onnx` beside the weight folder.

    Where `precision` is a quantized one, `compute` is the type of all that is not quantized, and
    static scales come from `ranges`. With `split=False` the transformer is the one-piece model.
    With `fused` its attention is ONNX Runtime's own operator where it can be.

    Raises `CheckpointError` for weights that do not fit, `ExportError` for a graph that fails the
    checks, `BundleError` where the disk refuses.
    """
    check_precision(name, precision)
    quantization = PRECISIONS[precision].quantization
    chain, weights = component_source(
        checkpoint, name, compute if quantization else precision, split
    )
    check_weights(chain, weights)
    folder.make()
    progress = progress or Progress(quiet=True)
    task = progress.task(f"  {name}: tracing ({precision})")
    model = trace_chain(chain)
    task.finish()
    boundary = len(chain.inputs)
    packed = {}
    if quantization is not None:
        chosen = partial(is_quantized, name)
        packed = quantize(model, boundary, name, chosen, quantization, ranges)
    if fused:
        fuse_attention(model)
    files = bind(
        model,
        boundary,
        weights,
        folder,
        f"{name}.{precision}",
        packed,
        lambda total: progress.task(f"  {name}: weights", total).advance,
        ledger,
    )
    proto = ir.to_proto(model)
    _check(proto, name)
    path = folder.root.parent / f"{name}.onnx"
    write_atomic(path, proto.SerializeToString(deterministic=True))
    tensors = (value.const_value for value in model.graph.initializers.values())
    return Exported(
        chain,
        precision,
        path.name,
        tuple(f"{folder.root.name}/{file}" for file in files),
        len(packed),
        sum(node.op_type == "Softmax" for node in model.graph),
        sum(tensor.nbytes for tensor in tensors if tensor is not None),
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
