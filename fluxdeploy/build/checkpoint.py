"""The checkpoint that a command is given: opened, hashed, and held against what can be built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdeploy.bundle.files import HashCache
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import CheckpointError, MissingDependencyError, UsageError
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from fluxdeploy.bundle import Bundle

__all__ = [
    "CheckpointHashes",
    "check_family",
    "checkpoint_record",
    "find_checkpoint",
    "hash_checkpoint",
    "limits",
    "open_recorded",
]


def find_checkpoint(checkpoint: str | None) -> Checkpoint:
    """Open a checkpoint: a path, a hub id, or one of `DEMO_CHECKPOINTS`; None is the default.

    No folder and no hub id can be meant by a name that begins with `demo:`. Raises `UsageError` for
    such a name that there is not, and `MissingDependencyError` without the packages of
    `fluxdeploy[export]`.
    """
    name = DEFAULT_CHECKPOINT if checkpoint is None else checkpoint
    if name.startswith("demo:") and name not in DEMO_CHECKPOINTS:
        raise UsageError(
            f"There is no checkpoint {name}. The ones that come with the package are "
            f"{' and '.join(DEMO_CHECKPOINTS)}."
        )
    try:
        import exporters.export  # noqa: F401
        from exporters.checkpoint import open_checkpoint
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading checkpoints needs the package {error.name}: pip install 'fluxdeploy[export]'."
        ) from error
    return open_checkpoint(DEMO_CHECKPOINTS.get(name, name))


@dataclass(frozen=True)
class CheckpointHashes:
    """SHA-256 of each weight file, by its real path, and of all of them together."""

    files: Mapping[Path, str]
    digest: str


def hash_checkpoint(checkpoint: Checkpoint, progress: Progress) -> CheckpointHashes:
    """Hash a checkpoint's weight files; those known not to have changed are not read again."""
    total = sum(file.stat().st_size for file in checkpoint.files)
    task = progress.task("Hashing the checkpoint", total=total)
    hashes = HashCache().hash_files(checkpoint.files, task.advance)
    files = {Path(os.path.realpath(file)): digest for file, digest in hashes.items()}
    whole = hashlib.sha256("\n".join(sorted(files.values())).encode())
    return CheckpointHashes(files, whole.hexdigest())


def checkpoint_record(bundle: Bundle) -> dict[str, Any]:
    """What a bundle says of the checkpoint that it was made from; empty where it does not."""
    origin = bundle.manifest.provenance.get("checkpoint")
    return origin if isinstance(origin, dict) else {}


def open_recorded(bundle: Bundle, name: str, progress: Progress) -> Checkpoint:
    """Open the checkpoint that a bundle was made from, where it lies now.

    Raises `UsageError` for another one, and what `find_checkpoint` raises.
    """
    checkpoint = find_checkpoint(name)
    if hash_checkpoint(checkpoint, progress).digest != checkpoint_record(bundle).get("sha256"):
        raise UsageError(
            f"{name} is not the checkpoint that {bundle.root} was made from: its weights or its "
            "layout differ."
        )
    return checkpoint


def limits(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint is made for and a bundle of it does not do, in words; None for nothing."""
    if checkpoint.pipeline != "FluxKontextPipeline":
        return None
    return (
        "a bundle of this Kontext checkpoint does text to image and image to image, and not the "
        "editing of a reference picture, which this version has no task for"
    )


def check_family(checkpoint: Checkpoint) -> None:
    """Refuse networks that do not belong together, and FLUX.1's tools (Fill, Canny, Depth)."""
    transformer, vae = checkpoint.transformer, checkpoint.vae
    packed = transformer.patch_size**2 * vae.latent_channels
    if transformer.in_channels != packed or transformer.out_channels != packed:
        raise CheckpointError(
            f"The transformer takes {transformer.in_channels} channels and gives "
            f"{transformer.out_channels}, where the VAE's latents make {packed}: FLUX.1 Fill, "
            "Canny, Depth and Kontext-like variants are not built yet."
        )
    pairs = (
        ("T5", checkpoint.t5.d_model, transformer.text_width),
        ("CLIP", checkpoint.clip.hidden_size, transformer.pooled_width),
    )
    for name, has, needs in pairs:
        if has != needs:
            raise CheckpointError(
                f"{name}'s width is {has}, but the transformer was trained on {needs}: "
                "the parts belong to different checkpoints."
            )
