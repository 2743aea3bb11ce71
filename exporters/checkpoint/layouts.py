"""Opening a checkpoint on disk or from a hub: in diffusers' layout, or as a single file."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from exporters.checkpoint.agreement import check_index
from exporters.checkpoint.checkpoint import Checkpoint, Part, read_json
from exporters.checkpoint.foreign import check_pipeline
from exporters.checkpoint.parts import FOLDERS, TOKENIZERS, read_folder
from exporters.checkpoint.single_file import open_single_file
from exporters.checkpoint.weight_files import is_gguf_file, is_weight_file
from fluxdeploy.errors import CheckpointError

__all__ = ["open_checkpoint", "read_folder"]


def open_checkpoint(path: str | Path, base: Path | None = None) -> Checkpoint:
    """Read the headers and configs of a checkpoint.

    `path` is a folder in diffusers layout, a folder or transformer file in Black Forest Labs'
    layout, or a hub id such as `black-forest-labs/FLUX.1-dev`, with `@` and a branch, tag or commit
    after it where another revision than the newest is meant. `base` is a folder with what does not
    stand in or beside such a file: text encoders, VAE, tokenizers, schedule. Weights are not read,
    but where two VAEs have to be compared.

    Raises `CheckpointError` for anything else, broken files, pickles and other model families.
    """
    root = Path(os.path.expanduser(path))
    if root.exists():
        return _open(root, base)
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(path))
    if hub_id is None or is_weight_file(root.name) or is_gguf_file(root.name):
        raise CheckpointError(
            f"There is no checkpoint at {path}: give a folder, a safetensors or GGUF file or a "
            "hub id."
        )
    from exporters.checkpoint.hub import download

    root, commit = download(hub_id[1], hub_id[2])
    opened = _open(root, base)
    lacking = f"{hub_id[1]} has none: copy {root} to a folder where you add it"
    absent = {name: f"{what}; {lacking}" for name, what in opened.absent.items()}
    return dataclasses.replace(opened, absent=absent, revision=commit)


def _open(root: Path, base: Path | None) -> Checkpoint:
    if base is not None and not base.is_dir():
        raise CheckpointError(
            f"The base {base} is no folder: name one with what {root.name} lacks, such as "
            "tokenizer/ and tokenizer_2/."
        )
    if not root.is_dir() or not (root / "model_index.json").is_file():
        return open_single_file(root, base)
    if base is not None:
        raise CheckpointError(
            f"{root} is in diffusers' layout and has all parts of its own: leave out the base "
            f"{base}, or name the file of a transformer."
        )
    return _open_diffusers(root)


def _open_diffusers(root: Path) -> Checkpoint:
    index = read_json(root / "model_index.json")
    check_pipeline(index, root)
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    for name, folder in FOLDERS.items():
        _add(parts, absent, name, root / folder)
    scheduler = root / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise CheckpointError(f"{root} has no scheduler/scheduler_config.json.")
    settings = index.get("_fluxdeploy", {})
    if not isinstance(settings, dict):
        raise CheckpointError(f"_fluxdeploy in {root}/model_index.json must be an object.")
    for name in ("transformer", "vae"):
        if name in parts and parts[name].given is None:
            raise CheckpointError(
                f"{root / name} has no config.json, which says what its tensors do not: the "
                "download is incomplete."
            )
    return Checkpoint(
        root,
        "diffusers",
        parts,
        absent,
        {n: root / folder for n, folder in TOKENIZERS.items() if (root / folder).is_dir()},
        read_json(scheduler),
        settings,
        check_index(index),
        pipeline=index["_class_name"],
    )


def _add(parts: dict[str, Part], absent: dict[str, str], name: str, folder: Path) -> None:
    """Read a part of diffusers' layout, or note what was looked for."""
    absent[name] = f"a folder {folder.name}/ with config.json and safetensors files was looked for"
    if folder.is_dir():
        parts[name] = read_folder(name, folder)
