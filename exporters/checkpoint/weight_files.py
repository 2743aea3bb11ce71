"""Which of a folder's files hold the weights of a part: as diffusers and transformers name them.

A part is one file, or shards and an index of them. Variants (`model.fp16.safetensors`,
`model.safetensors.index.fp16.json`) stand beside the plain files and are read where those are
missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from exporters.checkpoint.checkpoint import read_json
from exporters.checkpoint.tensors import Index
from fluxdeploy.errors import CheckpointError

__all__ = [
    "PICKLES",
    "Chosen",
    "check_files",
    "choose",
    "is_gguf_file",
    "is_weight_file",
    "list_weight_files",
    "read_index",
]

# Black Forest Labs' first releases had the short one.
_SUFFIXES = (".safetensors", ".sft")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files that can run code when opened, and are not read."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Chosen:
    """The files of a part: those that `index` names, or the one file of `files`.

    With an index, `files` are whole files beside its shards, which it has to name.
    """

    index: str | None
    files: tuple[str, ...]


@dataclass
class _Variant:
    """The files of one variant."""

    indices: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [*self.indices, *self.whole, *self.shards]


def is_weight_file(name: str) -> bool:
    """Whether a file is of safetensors by its name; macOS's `._` companions are not."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def is_gguf_file(name: str) -> bool:
    """Whether a file is a GGUF file by its name."""
    return name.lower().endswith(".gguf") and not name.startswith(".")


def list_weight_files(folder: Path) -> list[Path]:
    """The files of a folder that are of safetensors or GGUF by their names, in order."""
    return sorted(
        f
        for f in folder.iterdir()
        if (is_weight_file(f.name) or is_gguf_file(f.name)) and not f.is_dir()
    )


def choose(folder: Path | str, names: Iterable[str]) -> Chosen:
    """Pick a part's weight files from the names in its folder, which messages call `folder`.

    Raises `CheckpointError` where there are none, only pickles, or more than one choice.
    """
    names = sorted(names)
    variants: dict[str, _Variant] = {}
    for name in names:
        _sort_in(variants, name)
    if not variants:
        raise CheckpointError(_no_weights(folder, names))
    # The plain files go before their variants.
    if len(variants) > 1 and "" not in variants:
        found = ", ".join(variant.names[0] for variant in variants.values())
        raise CheckpointError(
            f"{folder} holds several variants and no plain weight file: {found}. Leave one of them."
        )
    chosen = variants.get("") or next(iter(variants.values()))
    if len(chosen.indices) > 1:
        raise CheckpointError(
            f"{folder} holds several indexes: {', '.join(chosen.indices)}. Leave the one that "
            "belongs to the checkpoint."
        )
    if chosen.indices:
        return Chosen(chosen.indices[0], tuple(chosen.whole))
    files = [*chosen.whole, *chosen.shards]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds several weight files and no index: {', '.join(files)}."
        )
    if chosen.shards and "-00001-of-00001" not in files[0]:
        raise CheckpointError(
            f"{folder} holds {files[0]}, a part of the weights, and no index of all parts: the "
            "download is incomplete."
        )
    return Chosen(None, tuple(files))


def _sort_in(variants: dict[str, _Variant], name: str) -> None:
    """Put a weight file or an index to the others of its variant."""
    if is_weight_file(name):
        stem, _, variant = name.rpartition(".")[0].partition(".")
        is_shard = _SHARD.search(stem) or _SHARD.search(variant)
        group = variants.setdefault(_SHARD.sub("", variant), _Variant())
        (group.shards if is_shard else group.whole).append(name)
        return
    stem, *words = name.split(".")
    if stem and words[-1:] == ["json"] and "index" in words and "safetensors" in words:
        variant = ".".join(w for w in words[:-1] if w not in ("index", "safetensors"))
        variants.setdefault(variant, _Variant()).indices.append(name)


def _no_weights(folder: Path | str, names: list[str]) -> str:
    ggufs = [name for name in names if is_gguf_file(name)]
    if ggufs:
        return (
            f"{folder} holds its weights as GGUF ({ggufs[0]}), which are read beside a "
            "transformer's file and not in such a folder: name the GGUF file of the transformer, "
            "and with --base the folder of the other parts."
        )
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"{folder} holds its weights as pickles, which can run code when opened: only "
            "safetensors files are read. Convert the checkpoint first."
        )
    return f"{folder} holds no safetensors file."


def read_index(folder: Path, name: str) -> Index:
    """The index of a folder's shards. Raises `CheckpointError` for one that cannot be followed."""
    file = folder / name
    weight_map: Any = read_json(file).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        raise CheckpointError(f"{file} has no weight_map of tensor names to file names.")
    index = Index(file, weight_map)
    for name in index.shards:
        if PurePosixPath(name).name != name or name == ".." or "\\" in name:
            raise CheckpointError(f"{file} names a file outside its folder: {json.dumps(name)}.")
    return index


def check_files(folder: Path, chosen: Chosen, index: Index) -> None:
    """Raise `CheckpointError` for a shard that is missing, and for a second set of weights."""
    for name in index.shards:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} lacks {name}, which its index names: the download is incomplete."
            )
    for name in chosen.files:
        if name not in index.shards:
            raise CheckpointError(
                f"{folder} holds its weights twice: in {name}, and in the files that "
                f"{chosen.index} names. Leave one of them."
            )
