"""A checkpoint's components as ONNX files with their weights beside them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from exporters.checkpoint import Checkpoint, Weights
from exporters.checkpoint.text_configs import is_spare
from exporters.components.chain import Chain
from exporters.components.component import Component
from exporters.components.side_paths import with_side_paths
from exporters.formats import Packed
from exporters.graph.fuse import fuse_attention
from exporters.graph.group_norms import split_group_norms
from exporters.graph.narrow import keep_16_bits
from exporters.graph.quantize import quantize
from exporters.graph.side_paths import add_side_paths
from exporters.graph.trace import trace_chain
from exporters.quality.layers import Layers
from exporters.weights.bind import NO_LEDGER, Ledger, WeightFolder, bind
from exporters.weights.decide import Placement, Storing, decide
from exporters.weights.unbind import unbind
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.errors import CheckpointError, ExportError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

__all__ = ["ExportSpec", "Exported", "check_all_used", "export_component", "specify"]

_INLINE_LIMIT = 1 << 20
"""Bytes of constants in a graph: masks and indices, never weights."""


@dataclass(frozen=True)
class ExportSpec:
    """A component that is to be exported, settled from a checkpoint's headers alone.

    precision: what it is built in. compute: the type of all that `precision` does not quantize.
    placements: what becomes of each of its weights. layers: of each of its layers, where it is
        quantized; nothing is spared, and nothing measured, until `with_layers` says so.
    """

    component: Component
    precision: str
    compute: str
    chain: Chain
    weights: Weights
    placements: tuple[Placement, ...]
    layers: Layers | None

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def linked(self) -> frozenset[Path]:
        """The checkpoint's files that the graph is to point into."""
        return frozenset(
            Path(os.path.realpath(placement.stored.file))
            for placement in self.placements
            if placement.how is Storing.LINKED
        )

    def with_layers(self, layers: Layers) -> ExportSpec:
        """The same, with other layers: weights that these spare stay as they are."""
        placements = _place(self.component, self.chain, self.weights, layers)
        return replace(self, placements=placements, layers=layers)

    def with_side_paths(self) -> ExportSpec:
        """The same, with the inputs of a low-rank side path at every linear."""
        return replace(self, chain=with_side_paths(self.chain))

    def copied(self) -> ExportSpec:
        """The same, with weights of its own: copies of what the graph needs of those files."""
        placements = tuple(
            replace(placement, how=Storing.COPIED) if placement.how is Storing.LINKED else placement
            for placement in self.placements
        )
        return replace(self, placements=placements)


def specify(
    checkpoint: Checkpoint, component: Component, precision: str, compute: str = "bf16"
) -> ExportSpec:
    """Settle the export of a component. `compute` counts where `precision` is a quantized one.

    Raises `UsageError` for a precision that it is not built in, and `CheckpointError` for a missing
    tensor and for a wrong shape or type.
    """
    component.check_precision(precision)
    quantization = PRECISIONS[precision].quantization
    layers = None if quantization is None else Layers(quantization)
    compute = compute if quantization is not None else precision
    chain, weights = component.source(checkpoint, compute)
    placements = _place(component, chain, weights, layers)
    return ExportSpec(component, precision, compute, chain, weights, placements, layers)


def _place(
    component: Component, chain: Chain, weights: Weights, layers: Layers | None
) -> tuple[Placement, ...]:
    if layers is None:
        return decide(chain, weights, None)
    return decide(
        chain,
        weights,
        lambda n: component.is_quantized(n) and layers.has_weight(n),
        lambda n: component.is_quantized(n) and layers.mean(n) is not None,
    )


def check_all_used(
    checkpoint: Checkpoint, specs: Collection[ExportSpec], known: Mapping[str, Component]
) -> None:
    """Raise `CheckpointError` for a tensor of a part that none of its components takes.

    Only of parts whose components, of all that are `known`, are exported. Whatever such a tensor is
    for, a picture without it is another one.
    """
    taken: dict[str, set[str]] = {}
    for spec in specs:
        taken.setdefault(spec.component.part, set()).add(spec.name)
    for part, names in taken.items():
        takers = {c.name for c in known.values() if c.part == part and c.present(checkpoint)}
        if not takers <= names:
            continue
        used = {p.name for spec in specs if spec.component.part == part for p in spec.placements}
        weights = checkpoint.part(part).weights
        spare = sorted(n for n in weights if n not in used and not is_spare(part, n))
        if spare:
            stored = weights[spare[0]]
            raise CheckpointError(
                f"Tensor {stored.name} in {stored.file} is none that FLUX.1's {part} has, and "
                "nothing would be done with it: the file is of another model, or holds two."
            )


@dataclass(frozen=True)
class Exported:
    """An exported component: its graph, and the weight files that it needs.

    `path` and `weights` are relative to the folder of the export. `quantized` counts the linears
    that are quantized as the precision says, `weights_only` those whose weight alone is,
    `attentions` the softmaxes, `wide_attentions` those that a recipe spares, and `weight_bytes`
    what all weights take in the types that the graph has them in.
    """

    path: str
    weights: tuple[str, ...]
    quantized: int
    weights_only: int
    attentions: int
    wide_attentions: int
    weight_bytes: int


def export_component(
    spec: ExportSpec,
    folder: WeightFolder,
    fused: bool = False,
    progress: Progress | None = None,
    ledger: Ledger = NO_LEDGER,
    earlier: Path | None = None,
    stem: str | None = None,
) -> Exported:
    """Trace a component, bind its weights and write `<stem>.onnx` beside the weight folder.

    `stem` is the component's name where it is None.

    With `fused` attention is ONNX Runtime's own operator where it can be, group norms are what it
    has a kernel for, and 16 bits stay so between operators. `earlier` is the graph of the same
    component with other weights: it is taken in place of a new trace.

    Raises `CheckpointError` for weights that do not fit, `ExportError` for a graph that fails the
    checks, `BundleError` where the disk refuses.
    """
    name, precision = spec.name, spec.precision
    stem = stem or name
    layers = spec.layers
    folder.make()
    progress = progress or Progress(quiet=True)
    boundary = len(spec.chain.inputs)
    if earlier is None:
        model, packed = _trace(spec, fused, progress)
    else:
        model, packed = unbind(earlier, boundary, spec.placements, layers)
    files = bind(
        model,
        boundary,
        spec.placements,
        folder,
        f"{stem}.{precision}",
        packed,
        lambda total: progress.task(f"  {name}: weights", total).advance,
        ledger,
    )
    proto = ir.to_proto(model)
    _check(proto, name)
    path = folder.root.parent / f"{stem}.onnx"
    write_atomic(path, proto.SerializeToString(deterministic=True))
    tensors = (value.const_value for value in model.graph.initializers.values())
    linears = [weight.removesuffix(".weight") for weight in packed]
    weights_only = sum(layers is not None and linear in layers.recipe.spared for linear in linears)
    attentions = sum(node.op_type == "Softmax" for node in model.graph)
    return Exported(
        path.name,
        tuple(f"{folder.root.name}/{file}" for file in files),
        len(packed) - weights_only,
        weights_only,
        attentions,
        0 if layers is None else layers.wide_attentions,
        sum(tensor.nbytes for tensor in tensors if tensor is not None),
    )


def _trace(
    spec: ExportSpec, fused: bool, progress: Progress
) -> tuple[ir.Model, Mapping[str, Packed]]:
    """A component's graph without weights, and those that it has quantized."""
    task = progress.task(f"  {spec.name}: tracing ({spec.precision})")
    model = trace_chain(spec.chain)
    task.finish()
    add_side_paths(model, spec.chain)
    packed: Mapping[str, Packed] = {}
    if spec.layers is not None:
        boundary, is_quantized = len(spec.chain.inputs), spec.component.is_quantized
        packed = quantize(model, boundary, spec.name, is_quantized, spec.layers)
    if fused:
        fuse_attention(model)
        split_group_norms(model)
        keep_16_bits(model)
    return model, packed


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
