"""Finding the parts of a checkpoint on disk, in diffusers' layout and in Black Forest Labs'."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from exporters.checkpoint.agreement import check_index
from exporters.checkpoint.checkpoint import Checkpoint, Part, read_json
from exporters.checkpoint.config import TransformerConfig
from exporters.checkpoint.contents import (
    COMFY_PREFIX,
    VAE_PREFIXES,
    Contents,
    contents_of,
    without_prefix,
)
from exporters.checkpoint.foreign import check_config, check_part, check_pipeline
from exporters.checkpoint.names import (
    canonical_controlnet,
    canonical_transformer,
    canonical_vae,
)
from exporters.checkpoint.tensors import (
    StoredTensor,
    Weights,
    attach_scales,
    read_entries,
    read_stored,
    same_values,
)
from exporters.checkpoint.text_configs import with_aliases
from exporters.checkpoint.weight_files import (
    PICKLES,
    check_files,
    choose,
    is_weight_file,
    list_weight_files,
    read_index,
)
from fluxdeploy.errors import CheckpointError

__all__ = ["open_checkpoint", "read_folder"]

_TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
_FOLDERS = {
    "transformer": "transformer",
    "vae": "vae",
    "clip": "text_encoder",
    "t5": "text_encoder_2",
}

_COMPARED = 4096
"""Elements of each tensor that are compared where a whole part would take too long."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers and configs of a checkpoint.

    `path` is a folder in diffusers layout, a folder or transformer file in Black Forest Labs'
    layout, or a hub id such as `black-forest-labs/FLUX.1-dev`, with `@` and a branch, tag or commit
    after it where another revision than the newest is meant. Weights are not read, but where two
    VAEs have to be compared.

    Raises `CheckpointError` for anything else, broken files, pickles and other model families.
    """
    root = Path(os.path.expanduser(path))
    if root.exists():
        return _open(root)
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(path))
    if hub_id is None or is_weight_file(root.name) or root.suffix == ".gguf":
        raise CheckpointError(
            f"There is no checkpoint at {path}: give a folder, a safetensors file or a hub id."
        )
    from exporters.checkpoint.hub import download

    root, commit = download(hub_id[1], hub_id[2])
    opened = _open(root)
    lacking = f"{hub_id[1]} has none: copy {root} to a folder where you add it"
    absent = {name: f"{what}; {lacking}" for name, what in opened.absent.items()}
    return dataclasses.replace(opened, absent=absent, revision=commit)


def _open(root: Path) -> Checkpoint:
    if root.is_dir() and (root / "model_index.json").is_file():
        return _open_diffusers(root)
    return _open_bfl(root)


def _open_diffusers(root: Path) -> Checkpoint:
    index = read_json(root / "model_index.json")
    check_pipeline(index, root)
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    for name, folder in _FOLDERS.items():
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
        _tokenizers(root),
        read_json(scheduler),
        settings,
        check_index(index),
        pipeline=index["_class_name"],
    )


def _open_bfl(path: Path) -> Checkpoint:
    root = path if path.is_dir() else path.parent
    found = _look_at(path)
    transformer = _transformer_file(path, found)
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    tensors = read_stored([transformer])
    own = {name: t for name, t in tensors.items() if not name.startswith(VAE_PREFIXES)}
    config = root / "config.json"
    parts["transformer"] = _part(
        "transformer", without_prefix(own, (COMFY_PREFIX,)), config, transformer
    )
    _add_vae(parts, absent, root, transformer, found)
    for name in ("clip", "t5"):
        _add(parts, absent, name, root / _FOLDERS[name])
        absent[name] += _unread_encoder(name, found)
        if name in parts:
            _check_encoders_beside(name, parts[name].weights, root, found)
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        root,
        "bfl",
        parts,
        absent,
        _tokenizers(root),
        read_json(scheduler) if scheduler.is_file() else None,
    )


def _look_at(path: Path) -> dict[Path, Contents]:
    """What the weight files hold: of a folder all, else the named one and those beside it.

    A broken file counts where it was named, or where the folder was.
    """
    if path.is_dir():
        return {file: contents_of(read_entries(file)) for file in list_weight_files(path)}
    found = {path: contents_of(read_entries(path))}
    for file in list_weight_files(path.parent):
        if file != path:
            try:
                found[file] = contents_of(read_entries(file))
            except CheckpointError:
                continue
    return found


def _transformer_file(path: Path, found: Mapping[Path, Contents]) -> Path:
    """The file of the transformer: the named one, or the only one of a folder."""
    files = [file for file, held in found.items() if "transformer" in held.parts]
    if not path.is_dir():
        if path not in files:
            raise _holds_none(path, found[path])
        files = [path]
    elif not files:
        raise _nothing_in(path, found)
    elif len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds several transformers ({names}): name one of them.")
    (file,) = files
    foreign = found[file].foreign
    if foreign is not None and foreign.role == "texts":
        raise CheckpointError(f"{file} is {foreign}. {foreign.advice}.")
    for other, held in found.items():
        # In a named folder all files are meant, and one that is meant would change the pictures.
        if path.is_dir() and other != file and held.foreign and held.foreign.role == "adapter":
            raise CheckpointError(
                f"{other}, beside {file.name}, is {held.foreign}. {held.foreign.advice}; or give "
                f"{file} itself, to leave the other file aside."
            )
    return file


def _holds_none(file: Path, held: Contents) -> CheckpointError:
    """The refusal of a named file that holds no transformer."""
    names = f"double_blocks.*, {COMFY_PREFIX}double_blocks.* or transformer_blocks.*"
    advice = f"{held.advice}. " if held.advice else ""
    return CheckpointError(
        f"{file} holds no FLUX.1 transformer: it is {held}. {advice}The tensors of one are named "
        f"{names}."
    )


def _nothing_in(root: Path, found: Mapping[Path, Contents]) -> CheckpointError:
    """The refusal of a folder without a transformer."""
    names = sorted(file.name for file in root.iterdir())
    for name in names:
        if name.lower().endswith(".gguf"):
            return CheckpointError(
                f"{root} holds a GGUF file ({name}) and no transformer in a safetensors file, and "
                "only those are read: use the checkpoint in bfloat16, float16 or FP8."
            )
    if len(found) == 1:
        ((file, held),) = found.items()
        return _holds_none(file, held)
    if found:
        seen = [f"{file.name} is {held}" for file, held in found.items()]
        more = f"; and {len(seen) - 3} more" if len(seen) > 3 else ""
        return CheckpointError(
            f"{root} holds no FLUX.1 transformer: {'; '.join(seen[:3])}{more}. Name the "
            "checkpoint's folder, or the file of its transformer."
        )
    for name in names:
        if name.endswith(PICKLES):
            return CheckpointError(
                f"{root} holds pickles ({name}), which can run code when opened: only safetensors "
                "files are read. Convert the checkpoint first."
            )
    return CheckpointError(
        f"{root} is no FLUX.1 checkpoint: it has neither model_index.json nor a safetensors file "
        "with a FLUX.1 transformer."
    )


def _add_vae(
    parts: dict[str, Part],
    absent: dict[str, str],
    root: Path,
    transformer: Path,
    found: Mapping[Path, Contents],
) -> None:
    """Read the VAE: inside the transformer's file, in a file beside it, or in a folder vae/.

    Raises `CheckpointError` where two of them hold different ones.
    """
    config = root / "vae" / "config.json"
    inside = [transformer] if "vae" in found[transformer].parts else []
    beside, strangers = _vaes_beside(transformer, found, parts["transformer"].weights)
    sources = []
    for file in (*inside, *beside):
        tensors = without_prefix(read_stored([file]), VAE_PREFIXES)
        sources.append((file, _part("vae", tensors, config, file)))
    folder = root / "vae"
    # It may hold the config alone.
    if folder.is_dir() and list_weight_files(folder):
        sources.append((folder, read_folder("vae", folder)))
    if sources:
        (first, parts["vae"]), *others = sources
        for other, part in others:
            weights = parts["vae"].weights
            if weights.keys() != part.weights.keys() or not same_values(weights, part.weights):
                raise CheckpointError(
                    f"There are two different VAEs, in {first} and in {other}: leave the one that "
                    "belongs to the transformer."
                )
    absent["vae"] = (
        "ae.safetensors, or a folder vae/ with weights, must stand beside the transformer"
    )
    if strangers:
        absent["vae"] += f" ({'; '.join(strangers[:3])})"


def _vaes_beside(
    transformer: Path, found: Mapping[Path, Contents], weights: Weights
) -> tuple[list[Path], list[str]]:
    """The files beside a transformer that hold its VAE alone, and what others are instead."""
    last = weights.get("proj_out.weight")
    vaes, strangers = [], []
    for file, held in found.items():
        if file == transformer or "transformer" in held.parts:
            continue
        if held.latents is None:
            if held.foreign is not None:
                strangers.append(f"{file.name} is {held.foreign}")
        elif last is not None and last.shape[:1] != (
            TransformerConfig.patch_size**2 * held.latents,
        ):
            strangers.append(
                f"{file.name} is the VAE of another family, of {held.latents} latent channels"
            )
        else:
            vaes.append(file)
    return vaes, strangers


def _check_encoders_beside(
    name: str, weights: Weights, root: Path, found: Mapping[Path, Contents]
) -> None:
    """Refuse a single file of a text encoder that is another one than the folder's.

    A part of each tensor is compared: all of T5 would take minutes.
    """
    for file, held in found.items():
        if name in held.parts:
            beside = _canonical(name, attach_scales(read_stored([file])))
            if not same_values(weights, beside, _COMPARED):
                raise CheckpointError(
                    f"There are two different text encoders, in {root / _FOLDERS[name]} and in "
                    f"{file}: leave the one that belongs to the transformer, in the folder."
                )


def _unread_encoder(part: str, found: Mapping[Path, Contents]) -> str:
    """What to tell of ComfyUI's single file of a text encoder, which has no config beside it."""
    for file, held in found.items():
        if part in held.parts:
            folder, tokenizer = _FOLDERS[part], _TOKENIZERS[part]
            return (
                f"; {file.name} alone does not do: put it into {folder}/ with its config.json, and "
                f"its tokenizer's files into {tokenizer}/, as FLUX.1's checkpoint in diffusers' "
                "layout has them (text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/)"
            )
    return ""


def _add(parts: dict[str, Part], absent: dict[str, str], name: str, folder: Path) -> None:
    """Read a part of diffusers' layout, or note what was looked for."""
    absent[name] = f"a folder {folder.name}/ with config.json and safetensors files was looked for"
    if folder.is_dir():
        parts[name] = read_folder(name, folder)


def read_folder(name: str, folder: Path) -> Part:
    """A part in a folder of diffusers' layout. Raises `CheckpointError` for what is not read.

    name: `transformer`, `vae`, `clip`, `t5` or `controlnet`.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA that was not merged (adapter_config.json): merge it into the "
            "weights first, for its file would not be read."
        )
    chosen = choose(folder, (file.name for file in folder.iterdir() if not file.is_dir()))
    if chosen.index is None:
        files, index = [folder / name for name in chosen.files], None
    else:
        index = read_index(folder, chosen.index)
        check_files(folder, chosen, index)
        files = [folder / name for name in index.shards]
    return _part(name, read_stored(files, index), folder / "config.json", files[0])


def _part(name: str, stored: Mapping[str, StoredTensor], config_file: Path, file: Path) -> Part:
    """A part of tensors as they are stored in `file` and others, and of its config."""
    config = read_json(config_file) if config_file.is_file() else None
    check_config(config or {}, config_file)
    check_part(stored, name, file)
    return Part(_canonical(name, attach_scales(stored)), config)


def _canonical(name: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A part's tensors under the names of the graphs."""
    if name == "transformer":
        return canonical_transformer(tensors)
    if name == "controlnet":
        return canonical_controlnet(tensors)
    return canonical_vae(tensors) if name == "vae" else with_aliases(tensors, name)


def _tokenizers(root: Path) -> dict[str, Path]:
    return {name: root / folder for name, folder in _TOKENIZERS.items() if (root / folder).is_dir()}
