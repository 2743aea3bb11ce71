"""ControlNets beside a checkpoint: found on the disk, and held against its transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exporters.checkpoint.checkpoint import MOST_CONTROLNETS, Checkpoint, Part, controlnet_name
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.checkpoint.parts import read_folder, require_fit
from fluxdeploy.errors import CheckpointError

__all__ = ["with_controlnets"]

_LAYOUT = (
    "Give the folder of one in diffusers' layout: a config.json of a FluxControlNetModel with its "
    "safetensors files"
)


def with_controlnets(checkpoint: Checkpoint, paths: Sequence[Path]) -> Checkpoint:
    """A checkpoint with the ControlNets of some folders as parts of it, in their order.

    Raises `CheckpointError` for a folder that holds none, and for one that was not made for this
    transformer.
    """
    if not paths:
        return checkpoint
    if len(paths) > MOST_CONTROLNETS:
        raise CheckpointError(
            f"There are {len(paths)} ControlNets. A bundle has {MOST_CONTROLNETS} at most."
        )
    parts = dict(checkpoint.parts)
    for number, path in enumerate(paths):
        part = _read(path)
        _check_fits(path, ControlNetConfig.of(part.weights, part.config), checkpoint)
        parts[controlnet_name(number)] = part
    found = replace(
        checkpoint, parts=parts, controlnet_folders=tuple(path.resolve().name for path in paths)
    )
    kinds = {bool(config.hint_channels) for config in found.controlnets}
    if len(kinds) > 1:
        raise CheckpointError(
            "Some of the ControlNets take pixels and some the VAE's latents, and the two repeat "
            "their residuals in different orders. Give those of one kind."
        )
    return found


def _read(path: Path) -> Part:
    """A ControlNet's part. Raises `CheckpointError` for anything else."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"The ControlNet {path} {what}. {_LAYOUT}.")
    if (path / "model_index.json").is_file():
        raise CheckpointError(f"{path} is a whole checkpoint and no ControlNet. {_LAYOUT}.")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json, as a ControlNet's folder has. {_LAYOUT}."
        )
    return read_folder("controlnet", path)


def _check_fits(path: Path, config: ControlNetConfig, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` where a ControlNet was made for another transformer, or another VAE.

    What it adds to the transformer has that one's width, and its heads share the same tables of
    positions.
    """
    if checkpoint.task != "text to image":
        raise CheckpointError(
            f"The checkpoint is one for {checkpoint.task}, and ControlNets go with text to image: "
            "build it without --controlnet."
        )
    if not checkpoint.vae.encoder:
        raise CheckpointError(
            "The VAE has no encoder, and a ControlNet begins with a picture: take the checkpoint's "
            "own VAE."
        )
    transformer, latents = checkpoint.transformer, checkpoint.latents
    has = {
        "a width of": (config.width, transformer.width),
        "axes_dims_rope": (list(config.axes_dims), list(transformer.axes_dims)),
        "text embeddings of": (config.text_width, transformer.text_width),
        "pooled embeddings of": (config.pooled_width, transformer.pooled_width),
        "latents of": (config.in_channels, latents.token_channels),
        "control pictures of": (config.control_channels, latents.token_channels),
    }
    require_fit(f"The ControlNet {path}", has, "another transformer, or for another task")
    # Each pair of convolutions halves the picture.
    side, levels = latents.spatial_factor, len(config.hint_channels) - 2
    hint = config.hint_channels[-1] if config.hint_channels else 0
    if hint and (1 << levels != side or hint * latents.patch_size**2 != config.control_channels):
        raise CheckpointError(
            f"The ControlNet {path} makes {hint} channels of {1 << levels} pixels a side, and the "
            f"checkpoint's tokens are patches of {latents.patch_size} of {side} pixels: it was "
            "made for another transformer."
        )
