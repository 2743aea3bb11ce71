"""What is quantized in an exported graph, read back from its file: scales and bytes.

Only what the graph says counts, so that a mistake of whoever wrote it is read as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from exporters.formats import FORMATS, EightBits, QuantizedLinear
from exporters.formats.graph_file import GraphFile, read_values
from exporters.formats.number_types import SMOOTHING_SUFFIX
from fluxdeploy.errors import ExportError

__all__ = ["QuantizedAttention", "read_attentions", "read_linears"]


@dataclass(frozen=True)
class QuantizedAttention:
    """The static scales of softmax(Q Kᵀ) V in an exported graph, where all of it is in 8 bits."""

    numbers: EightBits
    query: float
    key: float
    softmax: float
    value: float


def read_linears(path: Path) -> dict[str, QuantizedLinear]:
    """The linears of an exported graph whose weights are in few bits, by name.

    Weights are read when asked for. Raises `ExportError` for a file that is no ONNX graph, and for
    quantized weights in another form than the exporter's.
    """
    file = GraphFile(path)
    formats = {known.numbers.onnx_type.value: known for known in FORMATS.values()}
    # Scales may be of a type that another format has weights in.
    suffixes = {suffix for known in FORMATS.values() for suffix in known.suffixes}
    scales = tuple({*suffixes, SMOOTHING_SUFFIX})
    found = {}
    for name, weight in file.initializers.items():
        known = formats.get(weight.data_type)
        if known is None or name.endswith(scales):
            continue
        try:
            linear = known.read(file, weight)
        except (LookupError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written by this exporter: the use of {name} is not as expected."
            ) from error
        stem = name.removesuffix(".weight")
        linear = replace(linear, bias=file.initializers.get(f"{stem}.bias"))
        found[stem] = _smoothed(file, weight, linear)
    return found


def _smoothed(
    file: GraphFile, weight: onnx.TensorProto, linear: QuantizedLinear
) -> QuantizedLinear:
    """A linear whose input's channels may be multiplied with something before all else."""
    (reader,) = file.users[weight.name]
    product = reader if reader.op_type == "MatMulInteger" else file.users[reader.output[0]][0]
    vector = file.smoothing(product.input[0])
    if vector is None:
        return linear
    factors = read_values(vector, file.folder)
    return replace(linear, narrow=lambda x: linear.narrow(x * factors))


def read_attentions(path: Path) -> dict[str, QuantizedAttention]:
    """The quantized attentions of an exported transformer, "transformer_blocks.0.attn" and so on.

    Raises `ExportError` for a file that is no ONNX graph, and for attentions in another form than
    the exporter's: where a block has one of Q, K, V and softmax output in 8 bits, it has all four,
    and in the same type.
    """
    file = GraphFile(path)
    scales: dict[str, list[tuple[EightBits, float] | None]] = {}
    for node in file.nodes:
        if node.op_type != "Softmax":
            continue
        name = node.name.partition("/")[0].rpartition(".")[0] + ".attn"
        try:
            scales[name] = _attention_scales(file, node)
        except (LookupError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} was not written by this exporter: {name} is not as expected."
            ) from error
    attentions = {}
    for name, found in scales.items():
        whole = [scale for scale in found if scale is not None]
        if not whole:
            continue
        if len(whole) < len(found):
            part = ("Q", "K", "the softmax output", "V")[found.index(None)]
            raise ExportError(
                f"{path} was not written by this exporter: {part} of {name} is not quantized, "
                "though the rest of it is."
            )
        numbers = whole[0][0]
        attentions[name] = QuantizedAttention(numbers, *(scale for _, scale in whole))
    return attentions


def _attention_scales(
    file: GraphFile, softmax: onnx.NodeProto
) -> list[tuple[EightBits, float] | None]:
    """The types and scales of Q, K, softmax output and V; None for those not in 8 bits."""
    scores = file.producers[softmax.input[0]]
    while scores.op_type == "Cast":
        scores = file.producers[scores.input[0]]
    (mixed,) = file.users[softmax.output[0]]
    while mixed.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
        (mixed,) = file.users[mixed.output[0]]
    if scores.op_type != "MatMul" or mixed.op_type != "MatMul":
        raise ValueError
    types = {known.attention.onnx_type.value: known.attention for known in FORMATS.values()}
    scales: list[tuple[EightBits, float] | None] = []
    for value in (*scores.input, *mixed.input):
        nodes = file.narrowed(value)
        if nodes is None:
            scales.append(None)
            continue
        narrow, wide = nodes
        (kind,) = (entry.i for entry in narrow.attribute if entry.name == "output_dtype")
        if narrow.input[1] != wide.input[1]:
            raise ValueError
        scales.append((types[kind], file.scale(wide)))
    if len({numbers for numbers, _ in filter(None, scales)}) > 1:
        raise ValueError
    return scales
