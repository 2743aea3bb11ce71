"""The checkpoint that a command is given: opened, hashed, and held against what can be built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxdeploy.build.sizes import LONGEST_SIDE, MOST_STEPS, MOST_TEXT
from fluxdeploy.bundle.files import HashCache
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.errors import CheckpointError, MissingDependencyError, UsageError
from fluxdeploy.install import install_command
from fluxdeploy.lora import LoraFile
from fluxdeploy.openmp import sleeping_threads
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.schedule import sigmas

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from exporters.tokenizers import CanonicalTokenizer
    from fluxdeploy.bundle import Bundle

__all__ = [
    "CheckpointHashes",
    "calibration_digest",
    "check_drawable",
    "check_family",
    "check_limits",
    "checkpoint_record",
    "find_checkpoint",
    "find_text_remarks",
    "hash_checkpoint",
    "open_recorded",
    "recorded_task",
    "require_recorded",
    "require_unchanged",
]

_MOST_GUIDANCE = 1000.0
"""Guidance is trained at some 1 to 10, and enters as a sine of a thousand times its value."""


def find_checkpoint(
    checkpoint: str | None,
    loras: Sequence[LoraFile] = (),
    base: Path | None = None,
    controlnets: Sequence[Path] = (),
    ip_adapter: Path | None = None,
    image_encoder: Path | None = None,
    redux: Path | None = None,
    task: str | None = None,
) -> Checkpoint:
    """Open a checkpoint: a path, a hub id, or one of `DEMO_CHECKPOINTS`; None is the default.

    `loras` are merged into it, `base` is a folder with what a single file lacks, and the
    ControlNets in the folders `controlnets`, an IP-Adapter with its `image_encoder` and the Redux
    in the folder `redux` join it. `task` is what it is for, where it does not tell. No folder and
    no hub id can be meant by a name that begins with `demo:`. Raises `UsageError` for such a name
    that there is not, and `MissingDependencyError` without the packages of the extra `export`.
    """
    name = DEFAULT_CHECKPOINT if checkpoint is None else checkpoint
    if name.startswith("demo:") and name not in DEMO_CHECKPOINTS:
        raise UsageError(
            f"There is no checkpoint {name}. The ones that come with the package are "
            f"{', '.join(DEMO_CHECKPOINTS)}."
        )
    try:
        with sleeping_threads():
            import exporters.export  # noqa: F401
            from exporters.checkpoint import open_checkpoint
            from exporters.checkpoint.controlnet import with_controlnets
            from exporters.checkpoint.ip_adapter import with_ip_adapter
            from exporters.checkpoint.lora import merge_loras
            from exporters.checkpoint.redux import with_redux
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading checkpoints needs the package {error.name}: {install_command('export')}."
        ) from error
    opened = replace(open_checkpoint(DEMO_CHECKPOINTS.get(name, name), base), asked_task=task)
    adapted = with_ip_adapter(with_controlnets(opened, controlnets), ip_adapter, image_encoder)
    return merge_loras(with_redux(adapted, redux), loras)


@dataclass(frozen=True)
class CheckpointHashes:
    """SHA-256 of each weight file, by its real path, and of all of them together.

    Files of parts that joined it are no part of the whole, which says what the checkpoint itself
    is.
    """

    files: Mapping[Path, str]
    digest: str


def hash_checkpoint(
    checkpoint: Checkpoint, progress: Progress, cache: HashCache | None = None
) -> CheckpointHashes:
    """Hash a checkpoint's weight files; those that the cache knows are not read again.

    Raises `CheckpointError` for a file in which tensors lie elsewhere than when it was opened.
    """
    total = sum(file.stat().st_size for file in checkpoint.files)
    task = progress.task("Hashing the checkpoint", total=total)
    hashes = (cache or HashCache()).hash_files(checkpoint.files, task.advance)
    _require_same_places(checkpoint)
    files = {Path(os.path.realpath(file)): digest for file, digest in hashes.items()}
    beside = {
        Path(os.path.realpath(tensor.file))
        for name in checkpoint.parts_beside
        for tensor in checkpoint.parts[name].weights.values()
    }
    own = sorted(digest for file, digest in files.items() if file not in beside)
    whole = hashlib.sha256("\n".join(own).encode())
    return CheckpointHashes(files, whole.hexdigest())


def calibration_digest(checkpoint: Checkpoint, hashes: CheckpointHashes) -> str:
    """What a calibration is of: the weights, and the LoRAs that make it a model of another task."""
    reshaping = checkpoint.unmerged.loras
    if not reshaping:
        return hashes.digest
    lines = [hashes.digest, *(f"{lora.sha256}:{lora.scale}" for lora in reshaping)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _require_same_places(checkpoint: Checkpoint) -> None:
    from exporters.checkpoint.tensors import read_entries

    headers = {file: read_entries(file) for file in checkpoint.files}
    for part in checkpoint.parts.values():
        for stored in part.weights.values():
            entry = headers[stored.file].get(stored.name)
            if (
                entry is None
                or entry.dtype != stored.dtype
                or stored.offset < entry.offset
                or stored.offset + stored.nbytes > entry.offset + entry.nbytes
            ):
                raise _changed(stored.file)


def require_unchanged(cache: HashCache) -> None:
    """Raise `CheckpointError` for a file that has changed since the cache has hashed it."""
    for path in cache.changed():
        raise _changed(path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was changed while the checkpoint was read. Run the command again when nothing "
        "writes to it any more."
    )


def checkpoint_record(bundle: Bundle) -> dict[str, Any]:
    """What a bundle says of the checkpoint that it was made from; empty where it does not."""
    origin = bundle.manifest.provenance.get("checkpoint")
    return origin if isinstance(origin, dict) else {}


def open_recorded(
    bundle: Bundle,
    name: str,
    progress: Progress,
    loras: Sequence[LoraFile] = (),
    base: Path | None = None,
) -> Checkpoint:
    """Open the checkpoint that a bundle was made from, where it lies now, with its LoRAs.

    Raises `UsageError` for another one and for other LoRAs, and what `find_checkpoint` raises.
    """
    checkpoint = find_checkpoint(name, loras, base, task=recorded_task(bundle))
    merged = [asdict(record) for record in checkpoint.loras]
    if _unnamed(merged) != _unnamed(bundle.manifest.provenance.get("loras", [])):
        raise UsageError(
            f"{bundle.root} was made with other LoRAs: `fluxdeploy inspect` has its own. "
            "Name them with the same --lora as the build, and no others."
        )
    require_recorded(bundle, name, hash_checkpoint(checkpoint, progress))
    return checkpoint


def recorded_task(bundle: Bundle) -> str | None:
    """What a bundle's checkpoint is for, where its tensors cannot tell."""
    return "kontext" if "kontext" in bundle.manifest.tasks else None


def require_recorded(bundle: Bundle, name: str, hashes: CheckpointHashes) -> None:
    """Raise `UsageError` where the checkpoint `name` is none that a bundle was made from."""
    if hashes.digest != checkpoint_record(bundle).get("sha256"):
        raise UsageError(
            f"{name} is not the checkpoint that {bundle.root} was made from: its weights or its "
            "layout differ."
        )


def _unnamed(loras: Any) -> Any:
    """Records of LoRAs without the names of their files, which anybody may have changed."""
    records = loras if isinstance(loras, list) else []
    return [(r.get("sha256"), r.get("scale")) for r in records if isinstance(r, dict)]


def check_limits(checkpoint: Checkpoint) -> None:
    """Refuse recorded defaults that no engine is made for. Raises `CheckpointError`."""
    defaults = checkpoint.defaults
    limits = {
        "height": LONGEST_SIDE,
        "width": LONGEST_SIDE,
        "num_inference_steps": MOST_STEPS,
        "max_sequence_length": MOST_TEXT,
        "guidance_scale": _MOST_GUIDANCE,
    }
    for name, most in limits.items():
        if getattr(defaults, name) > most:
            raise CheckpointError(
                f"_fluxdeploy.{name} in model_index.json is {getattr(defaults, name):g}; at most "
                f"{most:g} can be drawn with."
            )


def check_drawable(checkpoint: Checkpoint, tokenizers: Mapping[str, CanonicalTokenizer]) -> None:
    """Refuse tokenizers that give what the text encoders do not take, and an impossible schedule.

    Raises `CheckpointError`, naming both sides.
    """
    rows = {"clip": checkpoint.clip.vocab_size, "t5": checkpoint.t5.vocab_size}
    for name, tokenizer in tokenizers.items():
        if tokenizer.largest_id >= rows[name]:
            raise CheckpointError(
                f"The {name} tokenizer has ids up to {tokenizer.largest_id}, and the text encoder "
                f"embeds {rows[name]}: they belong to different checkpoints."
            )
    longest, positions = tokenizers["clip"].max_length, checkpoint.clip.max_position_embeddings
    if longest != positions:
        raise CheckpointError(
            f"The clip tokenizer pads to {longest} tokens, and the text encoder has {positions} "
            "positions: they belong to different checkpoints."
        )
    _check_levels(checkpoint)


def find_text_remarks(
    checkpoint: Checkpoint, tokenizers: Mapping[str, CanonicalTokenizer]
) -> Iterator[str]:
    """What a user should know of text encoders and tokenizers that go together, and yet may not."""
    end, suffix = checkpoint.clip.eos_token_id, tokenizers["clip"].suffix
    # 2 is what configs of before 2023 say, and means the largest id: see `ClipPooling`.
    if end != 2 and end not in suffix:
        yield (
            f"the clip text encoder's config.json says eos_token_id {end}, and its tokenizer ends "
            f"prompts with {', '.join(map(str, suffix)) or 'nothing'}: as in transformers, the "
            "pooled embedding is then the same for every prompt"
        )


def _check_levels(checkpoint: Checkpoint) -> None:
    """Refuse a schedule whose noise levels do not fall, for a picture of the usual size."""
    step, defaults = checkpoint.token_pixels, checkpoint.defaults
    tokens = (defaults.height // step) * (defaults.width // step)
    with np.errstate(all="ignore"), suppress(ArithmeticError, UsageError):
        levels = sigmas(checkpoint.schedule, max(2, defaults.num_inference_steps), tokens)
        if 0 < levels[0] <= 1 + 1e-6 and (np.diff(levels) < 0).all():
            return
    raise CheckpointError(
        f"The scheduler's noise levels do not fall from 1 to 0 for a picture of {tokens} image "
        "tokens: the shifts in its config are out of any range."
    )


def check_family(checkpoint: Checkpoint) -> None:
    """Refuse networks that do not belong together, and what cannot do a checkpoint's task.

    What is missing is named before anything else.
    """
    for name in ("vae", "clip", "t5"):
        checkpoint.part(name)
    for name in ("clip", "t5"):
        checkpoint.tokenizer(name)
    transformer, task = checkpoint.transformer, checkpoint.task
    if task != "text to image" and not checkpoint.vae.encoder:
        raise CheckpointError(
            f"The VAE has no encoder, and the transformer is one for {task}, which begins with a "
            "picture: take the checkpoint's own VAE."
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
