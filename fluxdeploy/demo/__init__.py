"""The small trained checkpoints and the LoRA of the package, and the scenes that they draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fluxdeploy.demo.folders import Folders

__all__ = ["DEFAULT_CHECKPOINT", "DEMO_CHECKPOINTS", "DEMO_LORAS"]

_FOLDER = Path(__file__).parent / "checkpoints"

DEMO_CHECKPOINTS: Mapping[str, Path] = Folders(
    {f"demo:{name}": _FOLDER / name for name in ("dev", "schnell")},
    {f"demo:{name}": _FOLDER / name for name in ("fill", "kontext")},
    base=_FOLDER / "dev",
)
"""Folders in diffusers layout, by the names that commands take for them."""

DEMO_LORAS: Mapping[str, Path] = {
    "demo:embers": Path(__file__).parent / "loras" / "embers.safetensors",
}
"""LoRAs of `demo:dev`, by the names that `--lora` takes for them."""

DEFAULT_CHECKPOINT = "demo:dev"
"""What a command uses where no checkpoint is given."""
