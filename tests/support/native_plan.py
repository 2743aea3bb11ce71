"""A native engine's plan in NumPy, step by step: what its kernels must give, on any machine.

Steps compute in float32; numbers are rounded where they are written to a buffer, unless they are
to be exact. Buffers hold NaN before that, so that what nobody writes is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engines.native.file import EngineFile
from engines.native.plan import (
    Attention,
    Buffer,
    Convert,
    Kind,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
    Rows,
)

Array = NDArray[Any]
Floats = NDArray[np.float32]

TYPES: Mapping[Kind, Any] = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp8": ml_dtypes.float8_e4m3fn,
}


def load_tensors(file: EngineFile) -> dict[str, Array]:
    """The tensors of an engine's file, by name."""
    data = file.path.read_bytes()[file.data_offset :]
    return {
        name: np.frombuffer(
            data[each.offset : each.offset + each.nbytes], TYPES[each.kind]
        ).reshape(each.shape)
        for name, each in file.tensors.items()
    }


def run_plan(
    plan: Plan, tensors: Mapping[str, Array], inputs: Mapping[str, Array], *, exact: bool = False
) -> Floats:
    """The velocity [L, out_channels] of one picture; where it is `exact`, nothing is rounded.

    `inputs` are the plan's, without a batch's axis: hidden_states [L, in_channels], context [S, D],
    modulation [rows, D], rope_cos and rope_sin [T, head_dim].
    """
    run = _Run(plan, tensors, inputs, exact)
    for step in plan.steps:
        if isinstance(step, Convert):
            run.convert(step)
        elif isinstance(step, Norm):
            run.norm(step)
        elif isinstance(step, Linear):
            run.linear(step)
        elif isinstance(step, Rope):
            run.rope(step)
        else:
            run.attention(step)
    return run.buffers["velocity"]


class _Run:
    def __init__(
        self, plan: Plan, tensors: Mapping[str, Array], inputs: Mapping[str, Array], exact: bool
    ) -> None:
        self.plan = plan
        self.tensors = tensors
        self.inputs = inputs
        self.exact = exact
        self.text = len(inputs["context"])
        self.tokens = self.text + len(inputs["hidden_states"])
        self.buffers = {buffer.name: self._empty(buffer) for buffer in plan.buffers}
        for name in ("hidden_states", "context"):
            self.buffers[name][:] = inputs[name]

    def convert(self, step: Convert) -> None:
        scale = self._by_token(step.scale, step.rows)
        x = self._read(step.x, step.columns, step.rows)
        self._write(step.out, step.columns, step.rows, x / scale)

    def norm(self, step: Norm) -> None:
        width = self.plan.width
        x = self._read(step.x, width, step.rows)
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(1e-6))
        x = x * (1 + self._modulation(step.gain, step.rows))
        x += self._modulation(step.shift, step.rows)
        self._write(step.out, width, step.rows, x / self._by_token(step.scale, step.rows))

    def linear(self, step: Linear) -> None:
        x = self._read(step.x, step.inner, step.rows)
        weight = self.tensors[step.weight].astype(np.float32)
        scale = np.ones(len(weight), np.float32) if step.scale is None else self.tensors[step.scale]
        bias = self.tensors[step.bias]
        y = np.empty((len(x), step.columns), np.float32)
        groups = [slice(0, self.text), slice(self.text, None)] if step.grouped else [slice(None)]
        for group, rows in enumerate(groups):
            some = slice(group * step.columns, (group + 1) * step.columns)
            y[rows] = (x[rows] @ weight[some].T) * scale[some] + bias[some]
        out_scale = self._by_token(step.out_scale, step.rows)
        if step.epilogue == "plain":
            self._write(step.out, step.columns, step.rows, y)
        elif step.epilogue == "gelu":
            self._write(step.out, step.columns, step.rows, gelu(y) / out_scale)
        elif step.epilogue == "residual":
            y = self._read(step.out, step.columns, step.rows) + y * self._modulation(
                step.gate, step.rows
            )
            self._write(step.out, step.columns, step.rows, y)
        else:
            assert step.second is not None
            inner = step.columns - step.split
            self._write(step.out, step.split, step.rows, y[:, : step.split])
            self._write(step.second, inner, step.rows, gelu(y[:, step.split :]) / out_scale)

    def rope(self, step: Rope) -> None:
        norms = self.tensors[step.norms]
        x = self._heads(step.x)
        out = np.empty_like(x)
        for index, (factor, scale) in enumerate(
            zip((step.softmax, 1.0, 1.0), step.scales, strict=True)
        ):
            part = x[:, index]
            if index < 2:
                part = part / np.sqrt(np.square(part).mean(-1, keepdims=True) + np.float32(1e-6))
                part[: self.text] *= norms[index]
                part[self.text :] *= norms[2 + index]
                cos, sin = (self.inputs[name][:, None] for name in ("rope_cos", "rope_sin"))
                turned = np.stack((-part[..., 1::2], part[..., ::2]), -1).reshape(part.shape)
                part = part * cos + turned * sin
            out[:, index] = part * np.float32(factor) / np.float32(scale)
        self._write(step.out, 3 * self.plan.width, "all", out.reshape(self.tokens, -1))

    def attention(self, step: Attention) -> None:
        q, k, v = (self._heads(step.x)[:, index].swapaxes(0, 1) for index in range(3))
        q_scale, k_scale, v_scale = map(np.float32, step.scales)
        scores = (q @ k.swapaxes(1, 2)) * (q_scale * k_scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        weights = self._rounded(weights / np.float32(step.softmax_scale), step.x)
        mixed = (weights @ v) * (v_scale * np.float32(step.softmax_scale))
        flat = mixed.swapaxes(0, 1).reshape(self.tokens, -1)
        self._write(step.out, self.plan.width, "all", flat / np.float32(step.out_scale))

    def _empty(self, buffer: Buffer) -> Array:
        shape = (self.length(buffer.rows), buffer.columns)
        return np.full(shape, np.nan, np.float32)

    def length(self, rows: Rows) -> int:
        return {"text": self.text, "image": self.tokens - self.text, "all": self.tokens}[rows]

    def _view(self, place: Place, columns: int, rows: Rows) -> Array:
        view = self.buffers[place.buffer][:, place.column : place.column + columns]
        assert view.shape[1] == columns
        if self.plan.buffer(place.buffer).rows == "all":
            view = {"text": view[: self.text], "image": view[self.text :], "all": view}[rows]
        assert len(view) == self.length(rows)
        return view

    def _read(self, place: Place, columns: int, rows: Rows) -> Floats:
        values: Floats = self._view(place, columns, rows)
        assert not np.isnan(values).any(), f"{place} was read before it was written"
        return values

    def _write(self, place: Place, columns: int, rows: Rows, values: Floats) -> None:
        self._view(place, columns, rows)[:] = self._rounded(values, place)

    def _rounded(self, values: Floats, place: Place) -> Floats:
        """Numbers as the buffer of a place holds them."""
        return values if self.exact else rounded(values, self.plan.buffer(place.buffer).kind)

    def _heads(self, place: Place) -> Floats:
        """Q, K, V as [T, 3, heads, head_dim]."""
        flat = self._read(place, 3 * self.plan.width, "all")
        return flat.reshape(self.tokens, 3, self.plan.heads, self.plan.head_dim)

    def _modulation(self, rows: tuple[int, int], tokens: Rows) -> Floats:
        return self._spread(self.inputs["modulation"][list(rows)], tokens)

    def _by_token(self, pair: tuple[float, float], tokens: Rows) -> Floats:
        return self._spread(np.array(pair, np.float32)[:, None], tokens)

    def _spread(self, pair: Floats, tokens: Rows) -> Floats:
        """What belongs to text and image, for each of their tokens."""
        both = np.repeat(pair, [self.text, self.tokens - self.text], axis=0)
        spread: Floats = {"text": both[: self.text], "image": both[self.text :], "all": both}[
            tokens
        ]
        return spread


def rounded(values: Floats, kind: Kind) -> Floats:
    """The nearest numbers of a type, of two the even one; E4M3 is cut off at its ends."""
    if kind == "fp8":
        values = np.clip(values, -448, 448)
    return values.astype(TYPES[kind]).astype(np.float32)


def gelu(x: Floats) -> Floats:
    """The tanh form."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    made: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return made
