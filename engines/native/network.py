"""What a transformer's graph computes, read off its nodes.

The graph is the standard form of `exporters`, with Q/DQ around some products or without. It is read
from its output backwards, and told by its operators and constants, never by names. Each step back
has one form: what is in another is an error that names the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import onnx_ir as ir

from engines.native.plan import Part
from fluxdeploy.errors import EngineError

__all__ = [
    "Attended",
    "Dense",
    "Double",
    "Heads",
    "Modulated",
    "Network",
    "Single",
    "Stream",
    "read_network",
]

_FLOAT, _BF16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
_E4M3 = ir.DataType.FLOAT8E4M3FN

_INPUTS = ("hidden_states", "context", "modulation", "rope_cos", "rope_sin")
_OUTPUTS = ("velocity",)

_EPSILON = 1e-6
_HEADS_FIRST = (0, 2, 1, 3)
_INSTEAD = "use --runtime onnxruntime"


@dataclass(frozen=True)
class Dense:
    """A linear: x Wᵀ + bias.

    x: its input, before that is smoothed and quantized.
    weight: its weight, dequantized. bias: the initializer's name.
    rows, columns: how many channels it makes, and takes.
    step: the scale of its input where both that and the weight are in E4M3, else None.
    """

    x: ir.Value
    weight: Part
    bias: str
    rows: int
    columns: int
    step: float | None


@dataclass(frozen=True)
class Modulated:
    """LayerNorm of x, times 1 + a row of the modulation, plus another."""

    x: ir.Value
    shift: int
    gain: int


@dataclass(frozen=True)
class Heads:
    """Q, K, V of one stream, and the weights of their RMSNorms."""

    q: Dense
    k: Dense
    v: Dense
    norm_q: str
    norm_k: str
    head_dim: int

    @property
    def linears(self) -> tuple[Dense, Dense, Dense]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Attended:
    """softmax(scale · Q Kᵀ) V. steps: the scales of Q, K, V and the softmax where all are E4M3."""

    scale: float
    steps: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Stream:
    """Text's or the image's part of a double-stream block."""

    norm: Modulated
    heads: Heads
    out: Dense
    gate: int
    mlp_norm: Modulated
    up: Dense
    down: Dense
    mlp_gate: int


@dataclass(frozen=True)
class Double:
    """A double-stream block."""

    text: Stream
    image: Stream
    attention: Attended


@dataclass(frozen=True)
class Single:
    """A single-stream block; `out` takes attention and MLP side by side."""

    norm: Modulated
    heads: Heads
    attention: Attended
    up: Dense
    out: Dense
    gate: int


@dataclass(frozen=True)
class Network:
    """The whole transformer, its blocks in order."""

    embed: Dense
    doubles: tuple[Double, ...]
    singles: tuple[Single, ...]
    norm: Modulated
    out: Dense
    modulation_rows: int

    @property
    def head_dim(self) -> int:
        heads = [block.heads for block in self.singles]
        heads += [block.image.heads for block in self.doubles]
        return heads[0].head_dim


def read_network(graph: ir.Graph) -> Network:
    """Read a whole graph. Raises `EngineError` for what is no such transformer, and names the node.

    For a graph in other numbers than bfloat16 and E4M3 the error names those.
    """
    _check_numbers(graph)
    reader = _Reader(graph)
    network = reader.network()
    for node in graph:
        if node not in reader.known:
            _refuse(node)
    return network


def _check_numbers(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype not in (_FLOAT, _BF16, _E4M3, ir.DataType.INT64, ir.DataType.FLOAT16):
            kind = "other numbers" if value.dtype is None else value.dtype.name
            raise EngineError(
                f"The transformer holds {value.name} in {kind}, and of the few-bit types the "
                f"native runtime has FP8 (E4M3) alone: build it in fp8, or {_INSTEAD}."
            )
    for node in graph:
        if node.op_type == "MatMul" and node.outputs[0].dtype not in (_BF16, None):
            kind = node.outputs[0].dtype.name
            raise EngineError(
                f"The transformer computes in {kind} ({node.name}), and the native runtime in "
                f"bfloat16 alone: build it in bf16 or fp8, or {_INSTEAD}."
            )
    names = tuple(value.name for value in graph.inputs), tuple(v.name for v in graph.outputs)
    if sorted(map(str, names[0])) != sorted(_INPUTS) or names[1] != _OUTPUTS:
        raise EngineError(
            f"The transformer's graph makes {', '.join(map(str, names[1]))} of "
            f"{', '.join(map(str, names[0]))}, and the native runtime {_OUTPUTS[0]} of "
            f"{', '.join(_INPUTS)}: {_INSTEAD}."
        )


def _refuse(node: ir.Node) -> NoReturn:
    raise EngineError(
        f"The transformer's graph has {node.name or node.outputs[0].name} ({node.op_type}), which "
        f"the native runtime does not know: {_INSTEAD}."
    )


class _Reader:
    """A graph that is being read; `known` are the nodes that have a meaning so far."""

    def __init__(self, graph: ir.Graph) -> None:
        self.known: set[ir.Node] = set()
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._velocity = graph.outputs[0]
        self._rows: dict[ir.Value, tuple[int, int]] = {}
        self._lengths: list[tuple[ir.Node, ir.Value]] = []
        self._texts: set[ir.Value] = set()

    def network(self) -> Network:
        out = self._linear(self._cast(self._velocity, _FLOAT))
        norm = self._norm(out.x)
        joint = self._rows_of(norm.x, image=True)
        singles = []
        while (node := joint.producer()) is not None and node.op_type == "Cast":
            singles.append(self._single(joint))
            joint = singles[-1].norm.x
        text, image = self._concatenated(joint, 1)
        doubles = []
        while not self._is_input(text, "context"):
            doubles.append(self._double(text, image))
            text, image = doubles[-1].text.norm.x, doubles[-1].image.norm.x
        self._texts.add(text)
        embed = self._linear(image)
        if self._cast(embed.x, _BF16) is not self._inputs["hidden_states"]:
            _refuse(self._made(embed.x, "Cast"))
        for shape, value in self._lengths:
            if value not in self._texts:
                _refuse(shape)
        rows = self._modulation_size()
        return Network(embed, tuple(doubles[::-1]), tuple(singles[::-1]), norm, out, rows)

    # Blocks

    def _single(self, value: ir.Value) -> Single:
        x, gate, out = self._residual(value)
        mixed, gelu = self._concatenated(out.x, -1)
        up = self._linear(self._gelu(gelu))
        attention, q, k, v = self._attention(mixed)
        heads = self._heads(q, k, v)
        norm = self._norm(up.x)
        self._hold(norm.x is x and all(linear.x is up.x for linear in heads.linears), value)
        return Single(norm, heads, attention, up, out, gate)

    def _double(self, text: ir.Value, image: ir.Value) -> Double:
        self._texts.add(text)
        mlps = [self._mlp(value) for value in (text, image)]
        text, image = (mlp[0].x for mlp in mlps)
        self._texts.add(text)
        residuals = [self._residual(value) for value in (text, image)]
        joint = self._rows_of(residuals[0][2].x, image=False)
        if joint is not self._rows_of(residuals[1][2].x, image=True):
            _refuse(self._made(residuals[1][2].x, "Slice"))
        attention, *values = self._attention(joint)
        # Of each of Q and K the norms come first, and of V nothing.
        sides = zip(*(self._concatenated(value, 1) for value in values), strict=True)
        streams = []
        for (x, gate, out), (mlp_norm, up, down, mlp_gate), (q, k, v) in zip(
            residuals, mlps, sides, strict=True
        ):
            heads = self._heads(q, k, v)
            norm = self._norm(heads.v.x)
            self._hold(norm.x is x and all(one.x is heads.v.x for one in heads.linears), x)
            streams.append(Stream(norm, heads, out, gate, mlp_norm, up, down, mlp_gate))
        return Double(streams[0], streams[1], attention)

    def _mlp(self, value: ir.Value) -> tuple[Modulated, Dense, Dense, int]:
        x, gate, down = self._residual(value)
        up = self._linear(self._gelu(down.x))
        norm = self._norm(up.x)
        self._hold(norm.x is x, value)
        return norm, up, down, gate

    def _residual(self, value: ir.Value) -> tuple[ir.Value, int, Dense]:
        """x + gate · linear(..): x, the gate's row, and the linear."""
        total = self._made(self._cast(value, _BF16), "Add")
        product = self._made(total.inputs[1], "Mul")
        linear = self._linear(self._cast(product.inputs[1], _FLOAT))
        return self._cast(total.inputs[0], _FLOAT), self._row(product.inputs[0]), linear

    # Parts of blocks

    def _norm(self, value: ir.Value) -> Modulated:
        total = self._made(self._cast(value, _BF16), "Add")
        product = self._made(total.inputs[0], "Mul")
        layer = self._made(product.inputs[0], "LayerNormalization", axis=-1, stash_type=1)
        gain = self._made(product.inputs[1], "Add")
        weight = _numbers(layer.inputs[1])
        ones = bool(weight) and all(number == 1 for number in weight)
        epsilon = layer.attributes.get_float("epsilon", 1e-5)
        if len([x for x in layer.inputs if x is not None]) != 2 or not ones:
            _refuse(layer)
        if not math.isclose(epsilon, _EPSILON, rel_tol=1e-6):
            _refuse(layer)
        if _numbers(gain.inputs[1]) != [1]:
            _refuse(gain)
        x = self._cast(layer.inputs[0], _FLOAT)
        return Modulated(x, self._row(total.inputs[1]), self._row(gain.inputs[0]))

    def _gelu(self, value: ir.Value) -> ir.Value:
        node = self._made(value, "Gelu")
        if node.attributes.get_string("approximate", "none") != "tanh":
            _refuse(node)
        return _given(node, 0)

    def _linear(self, value: ir.Value) -> Dense:
        total = self._made(value, "Add")
        product = self._made(total.inputs[0], "MatMul")
        weight, rows, columns, narrow = self._weight(product)
        bias = self._parameter(total, 1, (rows,))
        x, step = self._dequantized(_given(product, 0))
        source = x.producer()
        smooths = source is not None and source.op_type == "Mul" and _is_parameter(source.inputs[1])
        if source is not None and smooths:
            self.known.add(source)
            vector = self._parameter(source, 1, (columns,))
            weight = Part(weight.source, weight.scale, weight.transpose, columns=vector)
            x = _given(source, 0)
        if not narrow or smooths:
            step = None
        return Dense(x, weight, bias, rows, columns, step)

    def _weight(self, product: ir.Node) -> tuple[Part, int, int, bool]:
        """A product's weight, its sizes, and whether it is in E4M3."""
        node = self._made(product.inputs[1], "Transpose", "DequantizeLinear")
        stored = _given(node, 0)
        shape = _sizes(stored)
        if not _is_parameter(stored) or len(shape) != 2:
            _refuse(node)
        if node.op_type == "Transpose":
            if _perm(node) != (1, 0) or stored.dtype != _BF16:
                _refuse(node)
            return Part(str(stored.name)), shape[0], shape[1], False
        columns, rows = shape
        block = node.attributes.get_int("block_size", 0)
        if stored.dtype != _E4M3 or len(node.inputs) != 2 or block:
            _refuse(node)
        if node.attributes.get_int("axis", 1) not in (1, -1):
            _refuse(node)
        scale = self._parameter(node, 1, (rows,))
        return Part(str(stored.name), scale, transpose=True), rows, columns, True

    def _heads(self, query: ir.Value, key: ir.Value, value: ir.Value) -> Heads:
        (q, norm_q, of_q), (k, norm_k, of_k) = (self._head_norm(x) for x in (query, key))
        v = self._linear(self._side_by_side(value, of_q))
        self._hold(of_q == of_k and q.rows == k.rows == v.rows and v.rows % of_q == 0, value)
        return Heads(q, k, v, norm_q, norm_k, of_q)

    def _head_norm(self, value: ir.Value) -> tuple[Dense, str, int]:
        """RMSNorm of a linear's heads: the linear, the norm's weight, and its size."""
        product = self._made(value, "Mul")
        quotient = self._made(product.inputs[0], "Div")
        root = self._made(quotient.inputs[1], "Sqrt")
        total = self._made(root.inputs[0], "Add")
        mean = self._made(total.inputs[0], "ReduceMean", keepdims=1, noop_with_empty_axes=0)
        square = self._made(mean.inputs[0], "Pow")
        if square.inputs[0] is not quotient.inputs[0] or _numbers(square.inputs[1]) != [2]:
            _refuse(square)
        if len(mean.inputs) != 2 or _numbers(mean.inputs[1]) != [-1]:
            _refuse(mean)
        (epsilon,) = _numbers(total.inputs[1]) or [0.0]
        if not math.isclose(epsilon, _EPSILON, rel_tol=1e-6):
            _refuse(total)
        weight = _given(product, 1)
        if not _is_parameter(weight):
            weight = self._cast(weight, _FLOAT)
        sizes = _sizes(weight)
        if not _is_parameter(weight) or len(sizes) != 1:
            _refuse(product)
        heads = self._cast(quotient.inputs[0], _FLOAT)
        return self._linear(self._side_by_side(heads, sizes[0])), str(weight.name), sizes[0]

    def _side_by_side(self, value: ir.Value, head_dim: int) -> ir.Value:
        """[B,T,D], of which a value is [B,T,heads,head_dim]."""
        node = self._made(value, "Reshape", allowzero=0)
        target = _numbers(node.inputs[1])
        if len(target) != 4 or target[0] != 0 or target[1] not in (0, -1) or target[3] != head_dim:
            _refuse(node)
        return _given(node, 0)

    def _attention(self, value: ir.Value) -> tuple[Attended, ir.Value, ir.Value, ir.Value]:
        """Attention [B,T,D]: Q and K before RoPE, and V, each [B,T,heads,head_dim]."""
        flat = self._made(value, "Reshape", allowzero=0)
        if len(target := _numbers(flat.inputs[1])) != 3 or target[0] != 0:
            _refuse(flat)
        mixed = self._made(self._transposed(flat.inputs[0], _HEADS_FIRST), "MatMul")
        weights, softmax_step = self._dequantized(_given(mixed, 0))
        softmax = self._made(self._cast(weights, _BF16), "Softmax", axis=-1)
        scores = self._made(self._cast(softmax.inputs[0], _FLOAT), "MatMul")
        query, q_step = self._dequantized(_given(scores, 0))
        turned, k_step = self._dequantized(_given(scores, 1))
        v, v_step = self._dequantized(_given(mixed, 1))
        scaled = self._made(self._cast(query, _BF16), "Mul")
        number = _numbers(scaled.inputs[1])
        if len(number) != 1:
            _refuse(scaled)
        q = self._transposed(scaled.inputs[0], _HEADS_FIRST)
        key = self._cast(self._transposed(turned, (0, 1, 3, 2)), _BF16)
        k = self._transposed(key, _HEADS_FIRST)
        steps = None
        if q_step and k_step and v_step and softmax_step:
            steps = (q_step, k_step, v_step, softmax_step)
        attended = Attended(number[0], steps)
        v = self._transposed(v, _HEADS_FIRST)
        return attended, self._unrotated(q), self._unrotated(k), v

    def _unrotated(self, value: ir.Value) -> ir.Value:
        """x of x · cos + (−b, a of each pair of x) · sin."""
        total = self._made(value, "Add")
        straight, across = (self._made(x, "Mul") for x in total.inputs)
        x = _given(straight, 0)
        self._table(straight, "rope_cos")
        self._table(across, "rope_sin")
        turned = self._made(across.inputs[0], "Reshape", allowzero=0)
        b, a = self._concatenated(_given(turned, 0), -1)
        b = _given(self._made(b, "Neg"), 0)
        split = self._made(b, "Split", axis=4)
        if tuple(split.outputs) != (a, b) or len(split.inputs) != 1:
            _refuse(split)
        pairs = self._made(split.inputs[0], "Reshape", allowzero=0)
        target = _numbers(pairs.inputs[1])
        if pairs.inputs[0] is not x or len(target) != 5 or target[4] != 2:
            _refuse(pairs)
        if _numbers(turned.inputs[1])[-1:] != [2 * target[3]]:
            _refuse(turned)
        return x

    def _table(self, product: ir.Node, name: str) -> None:
        node = self._made(product.inputs[1], "Unsqueeze")
        if node.inputs[0] is not self._inputs[name] or _numbers(node.inputs[1]) != [1]:
            _refuse(node)

    # Rows

    def _row(self, value: ir.Value | None) -> int:
        """The row of the modulation that a value [B,1,D] is."""
        if value is None or value.producer() is None:
            self._miss(value, "Split")
        start, size = self._span(value)
        if size != 1:
            _refuse(self._made(value, "Split"))
        return start

    def _span(self, value: ir.Value) -> tuple[int, int]:
        """The first of the modulation's rows that a value is, and how many."""
        if value is self._inputs["modulation"]:
            return 0, self._modulation_size()
        if value not in self._rows:
            node = self._made(value, "Split", axis=1)
            start, size = self._span(_given(node, 0))
            count = len(node.outputs)
            sizes = _numbers(node.inputs[1]) if len(node.inputs) > 1 else [size // count] * count
            if len(sizes) != count or sum(sizes) != size:
                _refuse(node)
            for output, part in zip(node.outputs, sizes, strict=True):
                self._rows[output] = start, part
                start += part
        return self._rows[value]

    def _modulation_size(self) -> int:
        sizes = _sizes(self._inputs["modulation"])
        if len(sizes) != 3 or sizes[1] < 1:
            raise EngineError(
                f"The transformer's modulation has the shape {sizes}, without a number of rows: "
                f"{_INSTEAD}."
            )
        return sizes[1]

    def _rows_of(self, value: ir.Value, *, image: bool) -> ir.Value:
        """What a value is the text's or the image's rows of."""
        node = self._made(value, "Slice")
        if len(node.inputs) != 5:
            _refuse(node)
        _, start, end, axes, steps = node.inputs
        bound = _numbers(end if image else start)
        fits = bound and (bound[0] >= 2**31 - 1 if image else bound == [0])
        if not fits or _numbers(axes) != [1] or _numbers(steps) != [1]:
            _refuse(node)
        length = self._made(start if image else end, "Shape", start=1, end=2)
        self._lengths.append((length, _given(length, 0)))
        return _given(node, 0)

    def _is_input(self, value: ir.Value, name: str) -> bool:
        """Whether a value is an input in bfloat16."""
        node = value.producer()
        if node is None or node.op_type != "Cast" or node.inputs[0] is not self._inputs[name]:
            return False
        self._cast(value, _BF16)
        return True

    # Nodes

    def _made(self, value: ir.Value | None, *op_types: str, **attributes: int) -> ir.Node:
        """The node that makes a value: one of these operators, with these attributes."""
        node = None if value is None else value.producer()
        if node is None:
            self._miss(value, op_types[0])
        if node.op_type not in op_types or node.domain not in ("", "ai.onnx"):
            _refuse(node)
        for name, number in attributes.items():
            if node.attributes.get_int(name, _DEFAULTS.get((node.op_type, name))) != number:
                _refuse(node)
        self.known.add(node)
        return node

    def _miss(self, value: ir.Value | None, op_type: str) -> NoReturn:
        raise EngineError(
            f"The transformer's graph reads {'nothing' if value is None else value.name} where the "
            f"native runtime expects what a {op_type} makes: {_INSTEAD}."
        )

    def _hold(self, fits: bool, value: ir.Value) -> None:
        """Refuse the node that makes a value where what it is made of does not fit together."""
        if not fits:
            node = value.producer()
            if node is None:
                self._miss(value, "Cast")
            _refuse(node)

    def _cast(self, value: ir.Value | None, kind: ir.DataType) -> ir.Value:
        return _given(self._made(value, "Cast", to=kind.value), 0)

    def _transposed(self, value: ir.Value | None, perm: Sequence[int]) -> ir.Value:
        node = self._made(value, "Transpose")
        if _perm(node) != tuple(perm):
            _refuse(node)
        return _given(node, 0)

    def _concatenated(self, value: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        node = self._made(value, "Concat", axis=axis)
        if len(node.inputs) != 2:
            _refuse(node)
        return _given(node, 0), _given(node, 1)

    def _dequantized(self, value: ir.Value) -> tuple[ir.Value, float | None]:
        """What a value is a copy of in E4M3, and its scale; the value itself where it is none."""
        node = value.producer()
        if node is None or node.op_type != "DequantizeLinear":
            return value, None
        wide = self._made(value, "DequantizeLinear")
        narrow = self._made(wide.inputs[0], "QuantizeLinear")
        if narrow.outputs[0].dtype != _E4M3 or not _same_scale(wide, narrow):
            _refuse(narrow)
        (step,) = _numbers(narrow.inputs[1])
        return _given(narrow, 0), step

    def _parameter(self, node: ir.Node, index: int, shape: tuple[int, ...]) -> str:
        """The name of an initializer that a node reads."""
        value = _given(node, index)
        if not _is_parameter(value) or _sizes(value) != list(shape):
            _refuse(node)
        return str(value.name)


_DEFAULTS: dict[tuple[str, str], int] = {
    ("Softmax", "axis"): -1,
    ("Reshape", "allowzero"): 0,
    ("LayerNormalization", "axis"): -1,
    ("LayerNormalization", "stash_type"): 1,
    ("ReduceMean", "keepdims"): 1,
    ("ReduceMean", "noop_with_empty_axes"): 0,
}
"""What ONNX says of attributes that are not there."""


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        _refuse(node)
    return value


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()) or ())


def _is_parameter(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.is_initializer()


def _sizes(value: ir.Value | None) -> list[int]:
    """A value's shape, with -1 for what is no number; [] where it is not known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [size if isinstance(size, int) else -1 for size in shape]


def _numbers(value: ir.Value | None) -> list[Any]:
    """The numbers of a constant; [] of another value."""
    tensor = None if value is None else value.const_value
    return [] if tensor is None else list(tensor.numpy().ravel().tolist())


def _same_scale(wide: ir.Node, narrow: ir.Node) -> bool:
    """Whether Q and DQ have one number as their scale, and no zero point."""
    scales = [_numbers(node.inputs[1]) if len(node.inputs) == 2 else [] for node in (wide, narrow)]
    return scales[0] == scales[1] and len(scales[0]) == 1 and scales[0][0] > 0
