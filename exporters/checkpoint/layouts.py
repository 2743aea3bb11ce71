"""Finding the parts of a checkpoint on disk, in diffusers' layout and in Black Forest Labs'."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from exporters.checkpoint.checkpoint import Checkpoint, Part, read_json
from exporters.checkpoint.names import canonical_transformer, canonical_vae
from exporters.checkpoint.tensors import StoredTensor, read_tensors
from exporters.checkpoint.text_configs import with_aliases
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.errors import CheckpointError

__all__ = ["open_checkpoint"]

# Pipelines of diffusers that share the transformer and VAE of FLUX.1-dev and -schnell.
_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_COMFY_PREFIX = "model.diffusion_model."
_VAE_PREFIXES = ("vae.", "first_stage_model.")
_TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
_TEXT_ENCODERS = {"clip": "text_encoder", "t5": "text_encoder_2"}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers and configs of a checkpoint; weights are not touched.

    `path` is a folder in diffusers layout, a folder or transformer file in Black Forest Labs'
    layout, or a hub id such as `black-forest-labs/FLUX.1-dev`.

    Raises `CheckpointError` for anything else, broken files, pickles and other model families.
    """
    root = Path(os.path.expanduser(path))
    if not root.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("."):
            from exporters.checkpoint.hub import download

            root = download(str(path))
        else:
            raise CheckpointError(
                f"There is no checkpoint at {path}: give a folder, a safetensors file or a hub id."
            )
    if root.is_dir() and (root / "model_index.json").is_file():
        return _open_diffusers(root)
    return _open_bfl(root)


def _open_diffusers(root: Path) -> Checkpoint:
    index = read_json(root / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in _PIPELINES:
        raise CheckpointError(
            f"{root} holds a {kind}; of FLUX.1, {', '.join(_PIPELINES)} checkpoints are read."
        )
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    _add(parts, absent, "transformer", root / "transformer", canonical_transformer)
    _add(parts, absent, "vae", root / "vae", canonical_vae)
    _add_text_encoders(parts, absent, root)
    scheduler = root / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise CheckpointError(f"{root} has no scheduler/scheduler_config.json.")
    settings = index.get("_fluxdeploy", {})
    if not isinstance(settings, dict):
        raise CheckpointError(f"_fluxdeploy in {root}/model_index.json must be an object.")
    tokenizers, schedule = _tokenizers(root), read_json(scheduler)
    return Checkpoint(root, "diffusers", parts, absent, tokenizers, schedule, settings, kind)


def _open_bfl(path: Path) -> Checkpoint:
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        found = {file: _kinds(file) for file in sorted(root.glob("*.safetensors"))}
        transformers = [file for file, kinds in found.items() if "transformer" in kinds]
        if not transformers:
            raise CheckpointError(_nothing_in(root))
        if len(transformers) > 1:
            names = ", ".join(file.name for file in transformers)
            raise CheckpointError(f"{root} holds several transformers ({names}): name one of them.")
        transformer = transformers[0]
    else:
        found = {path: _kinds(path)}
        found |= {f: _neighbour_kinds(f) for f in sorted(root.glob("*.safetensors")) if f != path}
        transformer = path
        if "transformer" not in found[path]:
            raise CheckpointError(
                f"{path} holds no FLUX.1 transformer: its tensors are not named double_blocks.*, "
                f"{_COMFY_PREFIX}double_blocks.* or transformer_blocks.*."
            )
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    tensors = {
        name: tensor
        for name, tensor in read_tensors([transformer]).items()
        if not name.startswith(_VAE_PREFIXES)
    }
    tensors = _without_prefix(tensors, (_COMFY_PREFIX,))
    config = root / "config.json"
    parts["transformer"] = Part(
        canonical_transformer(tensors), read_json(config) if config.is_file() else {}
    )
    vaes = [file for file, kinds in found.items() if "vae" in kinds]
    # A VAE inside the transformer's own file is the one that belongs to it.
    vaes = [transformer] if transformer in vaes else vaes
    if len(vaes) > 1:
        names = ", ".join(file.name for file in vaes)
        raise CheckpointError(f"{root} holds several VAEs ({names}): leave one beside the model.")
    if vaes:
        tensors = _without_prefix(read_tensors(vaes), _VAE_PREFIXES)
        config = root / "vae" / "config.json"
        parts["vae"] = Part(canonical_vae(tensors), read_json(config) if config.is_file() else {})
    else:
        _add(parts, absent, "vae", root / "vae", canonical_vae)
        absent["vae"] = "ae.safetensors, or a folder vae/, must stand beside the transformer"
    _add_text_encoders(parts, absent, root)
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        root,
        "bfl",
        parts,
        absent,
        _tokenizers(root),
        read_json(scheduler) if scheduler.is_file() else None,
    )


def _nothing_in(root: Path) -> str:
    pickles = sorted(f.name for f in root.iterdir() if f.suffix in _PICKLES)
    if pickles:
        return (
            f"{root} holds pickles ({pickles[0]}), which can run code when opened: "
            "only safetensors files are read. Convert the checkpoint first."
        )
    return (
        f"{root} is no FLUX.1 checkpoint: it has neither model_index.json nor a safetensors file "
        "with a FLUX.1 transformer."
    )


def _kinds(file: Path) -> set[str]:
    """Which networks a file of BFL's layout holds."""
    names = read_header(file).tensors
    kinds = set()
    marks = ("double_blocks.", "single_blocks.", "transformer_blocks.")
    if any(name.removeprefix(_COMFY_PREFIX).startswith(marks) for name in names):
        kinds.add("transformer")
    if any(f"{prefix}decoder.conv_in.weight" in names for prefix in ("", *_VAE_PREFIXES)):
        kinds.add("vae")
    return kinds


def _neighbour_kinds(file: Path) -> set[str]:
    """As `_kinds`, for a file that merely lies beside the one that was named."""
    try:
        return _kinds(file)
    except CheckpointError:
        return set()


def _without_prefix(
    tensors: dict[str, StoredTensor], prefixes: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """The tensors under a prefix, without it; all of them where none carries one."""
    for prefix in prefixes:
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if inside:
            return inside
    return tensors


def _add(
    parts: dict[str, Part],
    absent: dict[str, str],
    name: str,
    folder: Path,
    canonical: Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]],
) -> None:
    """Read a part of diffusers' layout, or note what was looked for."""
    absent[name] = f"a folder {folder.name}/ with config.json and safetensors files was looked for"
    if folder.is_dir():
        weights = canonical(read_tensors(_weight_files(folder)))
        config = folder / "config.json"
        parts[name] = Part(weights, read_json(config) if config.is_file() else {})


def _add_text_encoders(parts: dict[str, Part], absent: dict[str, str], root: Path) -> None:
    for name, folder in _TEXT_ENCODERS.items():

        def canonical(
            tensors: dict[str, StoredTensor], name: str = name
        ) -> dict[str, StoredTensor]:
            return with_aliases(tensors, name)

        _add(parts, absent, name, root / folder, canonical)


def _tokenizers(root: Path) -> dict[str, Path]:
    return {name: root / folder for name, folder in _TOKENIZERS.items() if (root / folder).is_dir()}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: those of its index, or the only one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    plain = [i for i in indices if re.fullmatch(r"[\w-]+\.safetensors\.index\.json", i.name)]
    if plain:
        return _indexed_files(folder, plain[0])
    files = sorted(folder.glob("*.safetensors"))
    # Variants such as model.fp16.safetensors stand beside the plain file.
    files = [f for f in files if f.name.count(".") == 1] or files
    if len(files) == 1:
        return files
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} holds several weight files and no index: {names}.")
    if any(file.suffix in _PICKLES for file in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds its weights as pickles, which can run code when opened: only "
            "safetensors files are read. Convert the checkpoint first."
        )
    raise CheckpointError(f"{folder} holds no safetensors file.")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).name != name or name == ".." or "\\" in name:
            raise CheckpointError(f"{index} names a file outside its folder: {json.dumps(name)}.")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} lacks {name}, which its index names: the download is incomplete."
            )
    return [folder / name for name in names]
