"""Which of the residuals that ControlNets give is added after which block of the transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from exporters.checkpoint.controlnet_config import ControlNetConfig

__all__ = ["KINDS", "Kind", "residual_count", "residual_rows"]

Kind = Literal["double", "single"]
"""Of blocks."""

KINDS: tuple[Kind, ...] = ("double", "single")


def residual_count(controlnets: Sequence[ControlNetConfig], kind: Kind) -> int:
    """How many residuals for blocks of a kind the transformer takes; 0 for none.

    As in diffusers, several ControlNets add up as many as each of them has, and the first one
    decides whether there are any.
    """
    counts = [getattr(config, f"{kind}_blocks") for config in controlnets]
    return min(filter(None, counts)) if counts and counts[0] else 0


def residual_rows(controlnets: Sequence[ControlNetConfig], kind: Kind, blocks: int) -> list[int]:
    """For each block, the number of the residual that is added after it.

    Each serves as many blocks that follow each other; those of ControlNets that take pixels are
    gone through again and again.
    """
    count = residual_count(controlnets, kind)
    if kind == "double" and controlnets[0].hint_channels:
        return [block % count for block in range(blocks)]
    return [block // -(-blocks // count) for block in range(blocks)]
