"""The low-rank side paths beside the linears of a bundle that was built with a rank.

Such a linear is y = W x + b + B (A x). Its A and B are no weights but inputs of the component, so
that a LoRA comes with a call. All linears that do the same in each block share two inputs: of
`transformer_blocks.3.attn.to_q` they are row 3 of

    lora_down.transformer_blocks.*.attn.to_q  [blocks, in, R]   A, transposed
    lora_up.transformer_blocks.*.attn.to_q    [blocks, R, out]  B, transposed, times the scale

and of a linear that there is once, such as `x_embedder`, row 0. R is at most the bundle's rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DOWN", "RANK", "UP", "SidePath", "find_side_paths", "is_side_input", "kind_of"]

RANK = "R"
"""The symbol of the rank in shapes."""

DOWN, UP = "lora_down.", "lora_up."

_BLOCK = re.compile(r"((?:single_)?transformer_blocks\.)(\d+)(\..+)")


@dataclass(frozen=True)
class SidePath:
    """The side paths of a kind of linears: so many `blocks`, from `columns` to `rows` channels."""

    kind: str
    blocks: int
    columns: int
    rows: int

    @property
    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """The inputs by their names."""
        return {
            DOWN + self.kind: (self.blocks, self.columns, RANK),
            UP + self.kind: (self.blocks, RANK, self.rows),
        }


def kind_of(linear: str) -> tuple[str, int]:
    """The kind of a linear, and its row in the inputs of that kind."""
    found = _BLOCK.fullmatch(linear)
    if found is None:
        return linear, 0
    blocks, number, rest = found.groups()
    return f"{blocks}*{rest}", int(number)


def is_side_input(name: str) -> bool:
    """Whether an input of a component is one of a side path."""
    return name.startswith((DOWN, UP))


def find_side_paths(inputs: Mapping[str, tuple[int | str, ...]]) -> dict[str, SidePath]:
    """The side paths that a component's inputs are of, by the kind of their linears.

    inputs: the shapes of all its inputs.

    Raises `ValueError` for one whose other half is missing or does not fit.
    """
    shapes = {name: shape for name, shape in inputs.items() if is_side_input(name)}
    found = {}
    for name in shapes:
        kind = name.removeprefix(DOWN).removeprefix(UP)
        down, up = shapes.get(DOWN + kind, ()), shapes.get(UP + kind, ())
        sizes = (*down[:2], *up[2:])
        path = SidePath(kind, *sizes) if len(sizes) == 3 else None  # type: ignore[arg-type]
        fits = path is not None and {DOWN + kind: down, UP + kind: up} == path.shapes
        if path is None or not fits or not all(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"the side path of {kind} must have the inputs {DOWN}{kind} [blocks, in, {RANK}] "
                f"and {UP}{kind} [blocks, {RANK}, out]"
            )
        found[kind] = path
    return found
