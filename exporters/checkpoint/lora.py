"""Merging LoRAs: the weights that they change are added to as they are read, none before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from exporters.checkpoint.checkpoint import Checkpoint, LoraRecord
from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.bundle.files import disk_errors, sha256_file
from fluxdeploy.lora import Change, LoraFile, read_lora

__all__ = ["merge_loras"]

_PARTS = ("transformer", "clip", "t5")
_TABLES = re.compile(r"(?:^|\.)(?:\w+_embedding|shared|embed_tokens|relative_attention_bias)$")
"""Looked up by ids, and so no linears."""


def merge_loras(checkpoint: Checkpoint, loras: Sequence[LoraFile]) -> Checkpoint:
    """A checkpoint with the LoRAs added to its weights, W + strength·(alpha/rank)·up@down.

    Raises `CheckpointError` for a file that is no LoRA of this checkpoint; see `read_lora`.
    """
    if not loras:
        return checkpoint
    weights: dict[str, dict[str, StoredTensor]] = {
        name: dict(checkpoint.parts[name].weights) for name in _PARTS if name in checkpoint.parts
    }
    linears = {name: _linears(tensors) for name, tensors in weights.items()}
    records = []
    for lora in loras:
        changes = read_lora(lora.path, linears).changes
        with disk_errors("read", lora.path):
            digest = sha256_file(lora.path)
        for part, found in changes.items():
            for linear, low_rank in found.items():
                stored = weights[part][f"{linear}.weight"]
                change = Change(low_rank, lora.strength, digest)
                weights[part][f"{linear}.weight"] = replace(
                    stored, changes=(*stored.changes, change)
                )
        records.append(LoraRecord(lora.path.name, digest, lora.strength))
    parts = {
        name: replace(part, weights=weights[name]) if name in weights else part
        for name, part in checkpoint.parts.items()
    }
    return replace(checkpoint, parts=parts, loras=tuple(records), base=checkpoint)


def _linears(weights: Weights) -> Mapping[str, tuple[int, int]]:
    found = {}
    for name, stored in weights.items():
        linear = name.removesuffix(".weight")
        if linear != name and len(stored.shape) == 2 and not _TABLES.search(linear):
            found[linear] = (stored.shape[0], stored.shape[1])
    return found
