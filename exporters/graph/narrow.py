"""Norms, modulation, RoPE and gates of a graph with 16 bits in and out.

A traced graph has casts around these, since they compute in float32: each is a pass over all tokens
that writes twice the bytes. ONNX Runtime's kernels for GPUs read and write 16 bits and compute the
norms in float32 inside, so the casts can go. LayerNormalization takes the modulation as its scale
and bias there, which makes one kernel of four. What is rounded in between is what diffusers rounds
in the same type; and RoPE's tables and products, whose kernel computes in the type of its input.

A residual stream in float32, as FP16 has it, leaves that type's range and stays.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["keep_16_bits"]

_16_BITS = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_SHAPES = {"Concat": 0, "Reshape": 1, "RMSNormalization": 0, "Split": 1}
"""Operators that 16 bits go through, and how many of their last inputs are shapes."""


def keep_16_bits(model: ir.Model) -> None:
    """Rewrite a graph after `fuse_attention`. One in float32 stays as it is."""
    narrowing = _Narrowing(model.graph)
    for node in list(model.graph):
        if node.op_type == "LayerNormalization":
            narrowing.modulated_norm(node)
        elif node.op_type == "RotaryEmbedding":
            narrowing.rope(node)
        elif node.op_type == "Cast":
            narrowing.gate(node)
    RemoveUnusedNodesPass()(model)


class _Narrowing:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def modulated_norm(self, norm: ir.Node) -> None:
        """norm(x) · (1 + scale) + shift as one node, in the type that x had before it was widened.

        Of an x in float32 only the result is narrowed. A norm with a scale of its own stays.
        """
        if not _is_bare(norm):
            return
        scaled = _only_user(norm, "Mul")
        shifted = _only_user(scaled, "Add")
        end = _only_user(shifted, "Cast")
        if scaled is None or shifted is None or end is None or end.outputs[0].dtype not in _16_BITS:
            return
        x, rows = _inputs(norm)[0], [_other(scaled, norm), _other(shifted, scaled)]
        narrow = _before_widening(x, end.outputs[0].dtype)
        if narrow is None:
            end.replace_input_with(0, self._copy(norm, [x, *rows], end).outputs[0])
            return
        rows = [self._narrow(row, narrow.dtype) for row in rows]
        self._instead(end, self._copy(norm, [narrow, *rows], end, narrow.dtype))

    def rope(self, node: ir.Node) -> None:
        """RoPE without the casts around it."""
        end = _only_user(node, "Cast")
        if end is None or end.outputs[0].dtype not in _16_BITS:
            return
        kind = end.outputs[0].dtype
        x, position, *tables = _inputs(node)
        inputs = [self._narrow(x, kind), position, *(self._narrow(t, kind) for t in tables)]
        self._instead(end, self._copy(node, inputs, end, kind))

    def gate(self, end: ir.Node) -> None:
        """residual + gate · update, both of which were widened for it."""
        kind, total = end.outputs[0].dtype, _inputs(end)[0].producer()
        if kind not in _16_BITS or total is None or total.op_type != "Add":
            return
        wide, gated = _inputs(total)
        product = gated.producer()
        if product is None or product.op_type != "Mul":
            return
        gate, update = _inputs(product)
        if any(_before_widening(value, kind) is None for value in (wide, update)):
            return
        factors = [self._narrow(gate, kind), self._narrow(update, kind)]
        scaled = self._copy(product, factors, end, kind).outputs[0]
        self._instead(end, self._copy(total, [self._narrow(wide, kind), scaled], end, kind))

    def _narrow(self, value: ir.Value, kind: ir.DataType | None) -> ir.Value:
        """A float32 value in 16 bits, made so as early as can be."""
        assert kind is not None
        before, node = _before_widening(value, kind), value.producer()
        if before is not None:
            return before
        if (value, kind) not in self._made:
            constant = value.const_value
            if constant is not None:
                name = f"{value.name}.{kind.name.lower()}"
                tensor = ir.Tensor(constant.numpy().astype(kind.numpy()), dtype=kind, name=name)
                narrow = ir.val(name, const_value=tensor)
                self._graph.register_initializer(narrow)
                self._made[value, kind] = narrow
            elif node is not None and (node.op_type in _SHAPES or _adds_constant(node)):
                inputs = _inputs(node)
                count = len(inputs) - (_SHAPES.get(node.op_type, 0) if len(inputs) > 1 else 0)
                narrowed = [self._narrow(x, kind) for x in inputs[:count]]
                copy = self._copy(node, [*narrowed, *inputs[count:]], node, kind)
                for old, new in zip(node.outputs, copy.outputs, strict=True):
                    self._made[old, kind] = new
            else:
                self._made[value, kind] = self._cast(value, kind)
        return self._made[value, kind]

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        name = f"{value.name}.{kind.name.lower()}"
        cast = ir.Node(
            "",
            "Cast",
            [value],
            attributes=[ir.AttrInt64("to", kind.value)],
            outputs=[ir.Value(name=name, type=ir.TensorType(kind))],
            name=f"{name}/Cast",
        )
        maker = value.producer()
        insert = self._graph[0].prepend if maker is None else maker.append
        insert(cast)
        return cast.outputs[0]

    def _copy(
        self,
        node: ir.Node,
        inputs: list[ir.Value],
        before: ir.Node,
        kind: ir.DataType | None = None,
    ) -> ir.Node:
        """A node with other inputs, in the graph before another; its outputs are of a type."""
        suffix = "modulated" if kind is None else kind.name.lower()
        outputs = [
            ir.Value(
                name=f"{output.name}.{suffix}",
                type=output.type if kind is None else ir.TensorType(kind),
            )
            for output in node.outputs
        ]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes=[ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()],
            outputs=outputs,
            name=f"{node.name}.{suffix}",
        )
        self._graph.insert_before(before, copy)
        return copy

    def _instead(self, end: ir.Node, made: ir.Node) -> None:
        """Give what a node makes to all that read a cast; the cast is unused then."""
        for user, index in list(end.outputs[0].uses()):
            user.replace_input_with(index, made.outputs[0])


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _is_bare(norm: ir.Node) -> bool:
    """Whether a LayerNormalization neither scales nor shifts, and is over the last axis."""
    axis = norm.attributes.get("axis")
    if len(norm.inputs) != 2 or (axis is not None and axis.as_int() != -1):
        return False
    scale = norm.inputs[1]
    tensor = None if scale is None else scale.const_value
    return tensor is not None and bool((tensor.numpy() == 1).all())


def _only_user(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """What alone reads a node's first output, if it is of a kind."""
    users = [] if node is None else list(node.outputs[0].uses())
    return users[0][0] if len(users) == 1 and users[0][0].op_type == op_type else None


def _other(node: ir.Node, maker: ir.Node) -> ir.Value:
    """The input of a sum or product that another node has not made."""
    first, second = _inputs(node)
    return second if first.producer() is maker else first


def _before_widening(value: ir.Value, kind: ir.DataType | None) -> ir.Value | None:
    """What a Cast has made this float32 value from, if it is of a type."""
    node = value.producer()
    if node is None or node.op_type != "Cast" or _inputs(node)[0].dtype != kind:
        return None
    return _inputs(node)[0]


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(value.const_value is not None for value in _inputs(node))
