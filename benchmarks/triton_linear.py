"""A linear in Triton for Hopper with what follows it: the first of the kernels to be measured.

Persistent: each multiprocessor takes tiles of the output in turns. Operands and results go through
the tensor memory accelerator, products in bfloat16 or E4M3 with float32 sums. Written for Triton
3.6; a `flatten` loop does not compile there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["CONFIGS", "EPILOGUES", "Config", "Linear"]

EPILOGUES = ("bias", "gelu", "residual")
"""y = x Wᵀ · scale + bias; then GELU and 8 bits; or residual + gate · y."""


@dataclass(frozen=True)
class Config:
    """A tile of the output, the bytes of a row of operands that are in flight, and the block."""

    rows: int
    columns: int
    depth_bytes: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth_bytes}B/{self.warps}w/{self.stages}s"


CONFIGS = (
    Config(128, 256, 128, 8, 4),
    Config(128, 256, 128, 8, 3),
    Config(128, 128, 128, 4, 4),
    Config(128, 128, 128, 8, 4),
    Config(256, 128, 128, 8, 3),
    Config(64, 256, 128, 4, 4),
)


@triton.jit
def _finish(
    y, out, residual, scale, bias, gate, row, column, WIDTH: tl.constexpr, KIND: tl.constexpr
):
    columns = column + tl.arange(0, WIDTH)
    y = y * tl.load(scale + columns)[None, :] + tl.load(bias + columns)[None, :]
    if KIND == "gelu":
        # 0.5 · (1 + tanh(u)) is sigmoid(2u).
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if KIND == "residual":
        y = residual.load([row, column]).to(tl.float32) + tl.load(gate + columns)[None, :] * y
    out.store([row, column], y.to(out.dtype))


@triton.jit
def _linear(
    x, weight, out, residual, scale, bias, gate, M, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PROGRAMS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(M, ROWS)
    for tile in tl.range(tl.program_id(0), down * tl.cdiv(N, COLUMNS), PROGRAMS):
        row, column = tile % down * ROWS, tile // down * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(tl.cdiv(K, DEPTH)):
            a = x.load([row, k * DEPTH])
            b = weight.load([column, k * DEPTH])
            total = tl.dot(a, b.T, total)
        # In two halves: a whole tile with its epilogue does not fit the registers.
        halves = total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1)
        left, right = tl.split(halves)
        half: tl.constexpr = COLUMNS // 2
        _finish(left, out, residual, scale, bias, gate, row, column, half, KIND)
        _finish(right, out, residual, scale, bias, gate, row, column + half, half, KIND)


class Linear:
    """y = x Wᵀ with an epilogue, for tensors that stay where they are.

    x [M,K] and weight [N,K] in bfloat16 or E4M3, residual [M,N] bfloat16; scale, bias and gate [N]
    float32. `out` [M,N] has the type of x for "gelu", and is bfloat16 otherwise.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        vectors: tuple[Tensor, Tensor, Tensor],
        residual: Tensor,
        epilogue: str,
        config: Config,
        programs: int,
    ) -> None:
        depth = config.depth_bytes // x.element_size()
        half = [config.rows, config.columns // 2]
        (rows, inner), columns = x.shape, weight.shape[0]
        self._arguments = (
            TensorDescriptor.from_tensor(x, [config.rows, depth]),
            TensorDescriptor.from_tensor(weight, [config.columns, depth]),
            TensorDescriptor.from_tensor(out, half),
            TensorDescriptor.from_tensor(residual, half),
            *vectors,
            rows,
            columns,
            inner,
        )
        self._constants: dict[str, Any] = {
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "DEPTH": depth,
            "PROGRAMS": programs,
            "KIND": epilogue,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
        self._grid = (min(programs, tiles),)

    def __call__(self) -> None:
        _linear[self._grid](*self._arguments, **self._constants)
