"""A FLUX.1 Redux beside a checkpoint: found on the disk, and held against its transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters.checkpoint.checkpoint import REDUX, Checkpoint, Part, read_json
from exporters.checkpoint.parts import make_part, read_folder
from exporters.checkpoint.redux_config import EMBEDDER, ENCODER, EXTRACTOR, ReduxConfig
from exporters.checkpoint.tensors import read_entries, read_stored
from exporters.checkpoint.weight_files import list_weight_files
from fluxdeploy.errors import CheckpointError

__all__ = ["with_redux"]

_PREPROCESSOR = "preprocessor_config.json"
_PIPELINE = "FluxPriorReduxPipeline"
_LAYOUT = (
    f"Give the folder of one as it is published: {ENCODER}/ with a SigLIP, {EMBEDDER}/ or "
    f"flux1-redux-dev.safetensors, and {EXTRACTOR}/{_PREPROCESSOR}"
)


def with_redux(checkpoint: Checkpoint, path: Path | None) -> Checkpoint:
    """A checkpoint with the Redux in a folder as a part of it.

    Raises `CheckpointError` for a folder that holds none, and for one that was not made for this
    transformer.
    """
    if path is None:
        return checkpoint
    part = _read(path)
    config = ReduxConfig.of(part.weights, part.config)
    needed = checkpoint.transformer.text_width
    if config.text_width != needed:
        raise CheckpointError(
            f"The Redux {path} makes text embeddings of {config.text_width}, and the checkpoint's "
            f"transformer reads {needed}: it was made for another one."
        )
    parts = {**checkpoint.parts, REDUX: part}
    return replace(checkpoint, parts=parts, redux_folder=path.resolve().name)


def _read(path: Path) -> Part:
    """A Redux's part: the tensors of both networks, below the names of their folders."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"The Redux {path} {what}. {_LAYOUT}.")
    index = path / "model_index.json"
    kind = read_json(index).get("_class_name") if index.is_file() else _PIPELINE
    if kind != _PIPELINE:
        raise CheckpointError(f"{path} holds a {kind!r:.80} and no Redux. {_LAYOUT}.")
    folder = path / ENCODER
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} has no {ENCODER}/config.json, as a Redux has. {_LAYOUT}.")
    networks = {ENCODER: read_folder("siglip", folder), EMBEDDER: _embedder(path)}
    configs: dict[str, Any] = {name: dict(part.config) for name, part in networks.items()}
    configs[EXTRACTOR] = read_json(_preprocessor(path))
    weights = {
        f"{name}.{tensor}": stored
        for name, part in networks.items()
        for tensor, stored in part.weights.items()
    }
    return Part(weights, configs)


def _embedder(path: Path) -> Part:
    """The projection: in a folder of its own, or in the one file of Black Forest Labs'."""
    if (path / EMBEDDER).is_dir():
        return read_folder("redux", path / EMBEDDER)
    files = [file for file in list_weight_files(path) if "redux_up.weight" in read_entries(file)]
    if len(files) != 1:
        found = " and ".join(file.name for file in files) or "no file"
        raise CheckpointError(f"{path} has no {EMBEDDER}/, and {found} with redux_up. {_LAYOUT}.")
    return make_part("redux", read_stored(files), path / "config.json", files[0])


def _preprocessor(path: Path) -> Path:
    # SigLIP's own folder, where it was copied from there.
    found = [path / folder / _PREPROCESSOR for folder in (EXTRACTOR, ENCODER)]
    file = next((file for file in found if file.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path} has no {EXTRACTOR}/{_PREPROCESSOR}, which says what the image encoder reads. "
            f"{_LAYOUT}."
        )
    return file
