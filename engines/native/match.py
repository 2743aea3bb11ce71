"""A transformer's graph as a plan: which products are in 8 bits, and what is written where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from engines.native.network import (
    Attended,
    Dense,
    Double,
    Heads,
    Modulated,
    Network,
    Single,
    read_network,
)
from engines.native.plan import (
    Attention,
    Buffer,
    Convert,
    Kind,
    Linear,
    Norm,
    Packed,
    Pair,
    Part,
    Place,
    Plan,
    Rope,
    Rows,
    Step,
)
from fluxdeploy.errors import EngineError

__all__ = ["match"]

_ONE: Pair = (1.0, 1.0)
_STREAM = Place("stream")


def match(model: ir.Model) -> Plan:
    """The plan of an exported transformer, whose weights are the model's initializers.

    A linear is in 8 bits where all that are multiplied together with it are, weights and inputs;
    attention is where what reads it is too. Raises `EngineError` for a graph of another form, which
    names the node that is not known, and for numbers other than bfloat16 and E4M3.
    """
    network = read_network(model.graph)
    _check(network)
    return _Writer(network).plan()


def _check(network: Network) -> None:
    """Raise `EngineError` where the parts do not have one width."""
    width, head_dim = network.embed.rows, network.head_dim
    heads: list[Heads] = []
    linears: list[tuple[Dense, int, int]] = [(network.out, network.out.rows, width)]
    for block in network.doubles:
        if block.text.up.rows != block.image.up.rows:
            raise EngineError(
                f"The MLPs of a double-stream block have {block.text.up.rows} and "
                f"{block.image.up.rows} channels, and the native runtime takes them as one: use "
                "--runtime onnxruntime."
            )
        for stream in (block.text, block.image):
            heads.append(stream.heads)
            inner = stream.up.rows
            linears += [(stream.out, width, width), (stream.up, inner, width)]
            linears += [(stream.down, width, inner)]
    for single in network.singles:
        heads.append(single.heads)
        inner = single.up.rows
        linears += [(single.up, inner, width), (single.out, width, width + inner)]
    linears += [(linear, width, width) for each in heads for linear in each.linears]
    for linear, rows, columns in linears:
        if (linear.rows, linear.columns) != (rows, columns):
            raise EngineError(
                f"The transformer's weight {linear.weight.source} is of {linear.columns} to "
                f"{linear.rows} channels, and the rest of it asks for {columns} to {rows}: export "
                "it again."
            )
    if any(each.head_dim != head_dim for each in heads) or width % head_dim:
        raise EngineError(
            f"The transformer's heads are not all of one size, {head_dim} channels of {width}: use "
            "--runtime onnxruntime."
        )


def _narrow(*streams: Sequence[Dense]) -> Pair | None:
    """The scales of the inputs of linears that are multiplied at once, for text and image.

    None where one of them is not in 8 bits, and so none can be.
    """
    found: list[float] = []
    for linears in streams:
        steps = {linear.step for linear in linears}
        step = steps.pop()
        if steps or step is None:
            return None
        found.append(step)
    return found[0], found[-1]


class _Writer:
    """A plan that is being written. The residual stream is always the buffer `stream`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._width = network.embed.rows
        self._buffers: dict[str, Buffer] = {}
        self._steps: list[Step] = []
        self._packed: list[Packed] = []

    def plan(self) -> Plan:
        network = self._network
        self._begin()
        for index, block in enumerate(network.doubles):
            self._double(f"double.{index}", block)
        for index, single in enumerate(network.singles):
            self._single(f"single.{index}", single)
        self._end()
        return Plan(
            self._width,
            network.head_dim,
            network.modulation_rows,
            tuple(self._buffers.values()),
            tuple(self._steps),
            tuple(self._packed),
        )

    def _begin(self) -> None:
        embed = self._network.embed
        hidden = self._place("hidden_states", embed.columns, "f32", "image")
        latents = self._place("latents", embed.columns, "bf16", "image")
        context = self._place("context", self._width, "f32", "text")
        self._place(_STREAM.buffer, self._width, "bf16")
        self._steps.append(Convert(hidden, latents, embed.columns, "image"))
        self._linear("embed", [[embed]], None, latents, _STREAM, "plain", rows="image")
        self._steps.append(Convert(context, _STREAM, self._width, "text"))

    def _end(self) -> None:
        norm, out = self._network.norm, self._network.out
        normed = self._norm(norm, norm, None, "image")
        predicted = self._place("predicted", out.rows, "bf16", "image")
        velocity = self._place("velocity", out.rows, "f32", "image")
        self._linear("out", [[out]], None, normed, predicted, "plain", rows="image")
        self._steps.append(Convert(predicted, velocity, out.rows, "image"))

    def _double(self, name: str, block: Double) -> None:
        text, image = block.text, block.image
        inner = image.up.rows
        # Q, K and V of both streams.
        heads = (text.heads, image.heads)
        threes = [each.linears for each in heads]
        scales = _narrow(*threes)
        normed = self._norm(text.norm, image.norm, scales)
        self._linear(f"{name}.qkv", threes, scales, normed, self._qkv("bf16"), "plain")
        # Attention, and its projections.
        outs = [[text.out], [image.out]]
        scales = _narrow(*outs)
        attended = self._place("attended", self._width, _kind(scales))
        scales = self._attend(name, heads, block.attention, attended, scales)
        gate = (text.gate, image.gate)
        self._linear(f"{name}.out", outs, scales, attended, _STREAM, "residual", gate=gate)
        # The MLPs.
        ups, downs = [[text.up], [image.up]], [[text.down], [image.down]]
        scales, steps = _narrow(*ups), _narrow(*downs)
        normed = self._norm(text.mlp_norm, image.mlp_norm, scales)
        hidden = self._place("hidden", inner, _kind(steps))
        self._linear(f"{name}.up", ups, scales, normed, hidden, "gelu", out_scale=steps or _ONE)
        gate = (text.mlp_gate, image.mlp_gate)
        self._linear(f"{name}.down", downs, steps, hidden, _STREAM, "residual", gate=gate)

    def _single(self, name: str, block: Single) -> None:
        linears, out = [[*block.heads.linears, block.up]], [[block.out]]
        scales, steps = _narrow(*linears), _narrow(*out)
        normed = self._norm(block.norm, block.norm, scales)
        joined = self._place("joined", self._width + block.up.rows, _kind(steps))
        self._linear(
            f"{name}.in",
            linears,
            scales,
            normed,
            self._qkv("bf16"),
            "split",
            split=3 * self._width,
            second=replace(joined, column=self._width),
            out_scale=steps or _ONE,
        )
        heads = (block.heads, block.heads)
        self._attend(name, heads, block.attention, joined, steps)
        gate = (block.gate, block.gate)
        self._linear(f"{name}.out", out, steps, joined, _STREAM, "residual", gate=gate)

    def _norm(
        self, text: Modulated, image: Modulated, scales: Pair | None, rows: Rows = "all"
    ) -> Place:
        normed = self._place("normed", self._width, _kind(scales))
        shift, gain = (text.shift, image.shift), (text.gain, image.gain)
        self._steps.append(Norm(_STREAM, normed, rows, shift, gain, scales or _ONE))
        return normed

    def _attend(
        self,
        name: str,
        heads: tuple[Heads, Heads],
        attention: Attended,
        out: Place,
        scales: Pair | None,
    ) -> Pair | None:
        """RoPE and attention, to `out`, which is to have these scales; those that it has."""
        text, image = heads
        norms = f"{name}.norms"
        names = (text.norm_q, text.norm_k, image.norm_q, image.norm_k)
        self._pack(norms, (4, text.head_dim), "f32", [Part(weight) for weight in names])
        qkv, scale = self._qkv("bf16"), attention.scale
        if scales is not None and attention.steps is not None:
            *three, softmax = attention.steps
            narrow, steps = self._qkv("fp8"), (three[0], three[1], three[2])
            # Attention writes all of its rows with one scale.
            step = max(scales)
            self._steps.append(Rope(qkv, narrow, norms, scale, steps))
            self._steps.append(Attention(narrow, out, steps, softmax, step))
            return step, step
        self._steps.append(Rope(qkv, qkv, norms, scale))
        if scales is None:
            self._steps.append(Attention(qkv, out))
        else:
            attended = self._place("attended", self._width, "bf16")
            self._steps.append(Attention(qkv, attended))
            self._steps.append(Convert(attended, out, self._width, "all", scales))
        return scales

    def _linear(
        self,
        name: str,
        streams: Sequence[Sequence[Dense]],
        scales: Pair | None,
        x: Place,
        out: Place,
        epilogue: Any,
        rows: Rows = "all",
        **others: Any,
    ) -> None:
        """Linears of one input as one: their weights one below the other, those of text first.

        `scales` are those of the input, None in 16 bits.
        """
        linears = [linear for stream in streams for linear in stream]
        inner, columns = linears[0].columns, sum(linear.rows for linear in streams[0])
        channels = len(streams) * columns
        weights = [linear.weight for linear in linears]
        scale = None
        if scales is not None:
            scale = f"{name}.scale"
            steps = [
                Part(str(linear.weight.scale), factor=step)
                for stream, step in zip(streams, scales, strict=False)
                for linear in stream
            ]
            self._pack(scale, (channels,), "f32", steps)
            weights = [replace(weight, scale=None) for weight in weights]
        self._pack(f"{name}.weight", (channels, inner), _kind(scales), weights)
        self._pack(f"{name}.bias", (channels,), "f32", [Part(linear.bias) for linear in linears])
        self._steps.append(
            Linear(
                x,
                out,
                rows,
                f"{name}.weight",
                f"{name}.bias",
                inner,
                columns,
                epilogue,
                grouped=len(streams) > 1,
                scale=scale,
                **others,
            )
        )

    def _qkv(self, kind: Kind) -> Place:
        return self._place("qkv", 3 * self._width, kind)

    def _place(self, name: str, columns: int, kind: Kind, rows: Rows = "all") -> Place:
        """The start of a buffer, which is made where it is not there yet.

        Blocks share it; one of 8 bits and one of other columns have names of their own.
        """
        if kind == "fp8":
            name = f"{name}8"
        found = self._buffers.setdefault(name, Buffer(name, rows, columns, kind))
        if found.columns != columns:
            name = f"{name}.{columns}"
            self._buffers.setdefault(name, Buffer(name, rows, columns, kind))
        return Place(name)

    def _pack(self, name: str, shape: tuple[int, ...], kind: Kind, parts: Sequence[Part]) -> None:
        self._packed.append(Packed(name, shape, kind, tuple(parts)))


def _kind(scales: Pair | None) -> Kind:
    return "bf16" if scales is None else "fp8"
