"""The small trained checkpoints that ship with the package, and the scenes that they draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["DEFAULT_CHECKPOINT", "DEMO_CHECKPOINTS"]

_FOLDER = Path(__file__).parent / "checkpoints"

DEMO_CHECKPOINTS: Mapping[str, Path] = {
    "demo:dev": _FOLDER / "dev",
    "demo:schnell": _FOLDER / "schnell",
}
"""Folders in diffusers layout, by the names that commands take for them."""

DEFAULT_CHECKPOINT = "demo:dev"
"""What a command uses where no checkpoint is given."""
