"""Merging LoRAs: the weights that they change are added to as they are read, none before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from exporters.checkpoint.checkpoint import Checkpoint, LoraRecord, Part
from exporters.checkpoint.tasks import TASKS
from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.bundle.files import disk_errors, sha256_file
from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora import Change, Difference, Lora, LoraFile, LowRank, read_lora

__all__ = ["merge_loras"]

_PARTS = ("transformer", "clip", "t5")
_TABLES = re.compile(r"(?:^|\.)(?:\w+_embedding|shared|embed_tokens|relative_attention_bias)$")
"""Looked up by ids, and so no linears."""

_NORM = re.compile(r".*\.attn\.norm_(?:added_)?[qk]")
_FIRST = "x_embedder"
"""The linear that reads a token's channels."""

_OF_A_TASK = ("guidance_scale", "num_inference_steps", "strength")
"""Of what a checkpoint's author recorded, that which another task has its own of."""


@dataclass(frozen=True)
class _Read:
    """A LoRA file that was read, and what is recorded of it."""

    file: LoraFile
    lora: Lora
    record: LoraRecord


def merge_loras(checkpoint: Checkpoint, loras: Sequence[LoraFile]) -> Checkpoint:
    """A checkpoint with the LoRAs added to its weights, W + strength·(alpha/rank)·up@down.

    One that takes more channels than the checkpoint, as BFL's control LoRAs do, makes it one of
    another task: what it has is kept for the latents' channels. Norms that a LoRA brings take the
    place of the checkpoint's.

    Raises `CheckpointError` for a file that is no LoRA of this checkpoint, see `read_lora`, and for
    LoRAs that cannot be merged together.
    """
    if not loras:
        return checkpoint
    read = [_read(checkpoint, file) for file in loras]
    wider = [each for each in read if each.lora.reads is not None]
    _check_together(read, wider)
    base = checkpoint
    for each in wider:
        base = _add(_widened(checkpoint, each.lora), [each])
    others = [each for each in read if each not in wider]
    merged = _add(base, others) if others else base
    return replace(
        merged,
        loras=tuple(each.record for each in read),
        base=base if others else None,
    )


def _read(checkpoint: Checkpoint, file: LoraFile) -> _Read:
    parts = {name: checkpoint.parts[name] for name in _PARTS if name in checkpoint.parts}
    linears = {name: _linears(part.weights) for name, part in parts.items()}
    norms = {
        name: stored.shape[0]
        for weight, stored in parts["transformer"].weights.items()
        if (name := weight.removesuffix(".weight")) != weight and _NORM.fullmatch(name)
    }
    lora = read_lora(file.path, linears, norms=norms)
    with disk_errors("read", file.path):
        digest = sha256_file(file.path)
    return _Read(file, lora, LoraRecord(file.path.name, digest, file.strength))


def _check_together(read: Sequence[_Read], wider: Sequence[_Read]) -> None:
    """Refuse control LoRAs of which each would take the other's place."""
    if len(wider) > 1:
        names = " and ".join(str(each.file.path) for each in wider)
        raise CheckpointError(
            f"{names} each make the model read more channels. Name one of them, and build a bundle "
            "for each."
        )
    owners: dict[str, _Read] = {}
    for each in read:
        for norm in each.lora.norms:
            first = owners.setdefault(norm, each)
            if first is not each:
                raise CheckpointError(
                    f"{first.file.path} and {each.file.path} both bring their own {norm}. Name one "
                    "of them."
                )


def _widened(checkpoint: Checkpoint, lora: Lora) -> Checkpoint:
    """The checkpoint with as many channels as a LoRA takes, of which the new ones count nothing.

    Raises `CheckpointError` where no task has so many, and for a checkpoint of a task of its own.
    """
    part, reads = checkpoint.part("transformer"), lora.reads
    assert reads is not None
    if checkpoint.controlnet_folders:
        raise CheckpointError(
            f"{lora.path} makes the model read {reads} channels, and ControlNets go with text to "
            "image: build it without --controlnet."
        )
    if "vae" in checkpoint.parts:
        known = {task: checkpoint.latents.channels_read(task) for task in TASKS}
        if reads not in known.values():
            listed = ", ".join(f"{count} for {task}" for task, count in known.items())
            raise CheckpointError(
                f"{lora.path} makes the model read {reads} channels; FLUX.1's read {listed}. It is "
                "a LoRA of another model."
            )
        if checkpoint.task != "text to image":
            raise CheckpointError(
                f"{lora.path} makes a text-to-image model read {reads} channels, and "
                f"{checkpoint.root} is one for {checkpoint.task}. Merge it into FLUX.1-dev."
            )
    weight = f"{_FIRST}.weight"
    weights = {**part.weights, weight: part.weights[weight].padded(reads)}
    given = part.given
    if given is not None and "in_channels" in given:
        given = {**given, "in_channels": reads}
    return replace(
        checkpoint,
        parts={**checkpoint.parts, "transformer": Part(weights, given)},
        settings={k: v for k, v in checkpoint.settings.items() if k not in _OF_A_TASK},
    )


def _add(checkpoint: Checkpoint, read: Sequence[_Read]) -> Checkpoint:
    """The checkpoint with what the files change, each record beside those that it has."""
    weights: dict[str, dict[str, StoredTensor]] = {
        name: dict(checkpoint.parts[name].weights) for name in _PARTS if name in checkpoint.parts
    }
    for each in read:
        for part, name, difference in _differences(each.lora):
            stored = weights[part].get(name)
            if stored is None:
                raise CheckpointError(
                    f"{each.file.path} adds to {name}, which this model has not: it is a LoRA of "
                    "another model."
                )
            if isinstance(difference, LowRank):
                difference = replace(difference, width=stored.shape[1])
            change = Change(difference, each.file.strength, each.record.sha256)
            weights[part][name] = replace(stored, changes=(*stored.changes, change))
    parts = {
        name: replace(part, weights=weights[name]) if name in weights else part
        for name, part in checkpoint.parts.items()
    }
    records = (*checkpoint.loras, *(each.record for each in read))
    return replace(checkpoint, parts=parts, loras=records)


def _differences(lora: Lora) -> Iterator[tuple[str, str, Difference]]:
    """What a LoRA does to each tensor: its part, its name, and the difference."""
    for part, changes in lora.changes.items():
        for linear, low_rank in changes.items():
            yield part, f"{linear}.weight", low_rank
    for part, biases in lora.biases.items():
        for linear, bias in biases.items():
            yield part, f"{linear}.bias", bias
    for norm, new in lora.norms.items():
        yield "transformer", f"{norm}.weight", new


def _linears(weights: Weights) -> Mapping[str, tuple[int, int]]:
    found = {}
    for name, stored in weights.items():
        linear = name.removesuffix(".weight")
        if linear != name and len(stored.shape) == 2 and not _TABLES.search(linear):
            found[linear] = (stored.shape[0], stored.shape[1])
    return found
