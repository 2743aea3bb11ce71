"""The tiles of products: which are known, and which a linear of some size gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engines.native.plan import Kind

__all__ = ["FEW_ROWS", "Form", "Tile", "choose_tiles"]

FEW_ROWS = 2304
"""Rows up to which a linear takes the tiles for small pictures."""

Form: TypeAlias = Literal["pingpong", "shared"]


@dataclass(frozen=True)
class Tile:
    """A tile of a linear's output, and how it is computed.

    rows, columns: its size. warps: of a program. stages: loads of operands that are in flight, each
    of 128 bytes of a row. programs: on a multiprocessor at once. flatten: whether the loads of a
    tile begin while the one before is finished. form: of `engines.native.linear`'s kernel, which
    has its own warps, and as many stages as fit up to these; None for the one of
    `engines.native.kernels`.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1
    flatten: bool = False
    form: Form | None = None

    def turns(self, head_dim: int) -> bool:
        """Whether a linear with this tile can norm and turn heads of that width."""
        return self.form == "shared" and head_dim == 128

    def __str__(self) -> str:
        if self.form is not None:
            return f"{self.rows}x{self.columns}, {self.form}, {self.stages} stages"
        flat = ", flat" if self.flatten else ""
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages{flat}" + (
            f", {self.programs} programs" if self.programs > 1 else ""
        )


_PINGPONG = Tile(128, 128, 4, 6, form="pingpong")
_SHARED = Tile(128, 256, 4, 4, form="shared")

_TILES: Mapping[tuple[Kind, str, bool], tuple[Tile, Tile]] = {
    ("fp8", "plain", False): (_PINGPONG, _PINGPONG),
    ("fp8", "split", False): (_SHARED, _SHARED),
    ("fp8", "gelu", False): (_PINGPONG, _PINGPONG),
    ("fp8", "residual", False): (_PINGPONG, _PINGPONG),
    ("fp8", "residual", True): (_PINGPONG, _SHARED),
    ("bf16", "plain", False): (_PINGPONG, _SHARED),
    ("bf16", "split", False): (_PINGPONG, _SHARED),
    ("bf16", "gelu", False): (_PINGPONG, _PINGPONG),
    ("bf16", "residual", False): (_PINGPONG, _PINGPONG),
    ("bf16", "residual", True): (_SHARED, _SHARED),
}
"""For few rows and for many, by whether there are many channels in: the fastest at FLUX.1's sizes
on an H100, of those that `benchmarks/gpu_kernels.py` tries."""

_SMALL = Tile(128, 64, 4, 4)
"""Its halves are on one side of any split, and columns past the last are left out."""

_LONG = 8192


def choose_tiles(x: Kind, columns: int, inner: int, epilogue: str, split: int) -> tuple[Tile, ...]:
    """The tiles of a linear, for few rows and for many; one where both are the same.

    Where the fastest does not divide the columns and their split, one that does, or the smallest.
    """
    known = _TILES[x, epilogue, inner > _LONG and epilogue == "residual"]
    chosen = []
    for tile in known:
        others = (tile, _PINGPONG)
        fitting = (t for t in others if columns % t.columns == split % t.columns == 0)
        chosen.append(next(fitting, _SMALL))
    return tuple(dict.fromkeys(chosen))
