"""Checkpoints whose transformer is a file: Black Forest Labs' layout, ComfyUI's files, GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.checkpoint.checkpoint import Checkpoint, Part, read_json
from exporters.checkpoint.config import TransformerConfig, is_guided
from exporters.checkpoint.contents import (
    COMFY_PREFIX,
    Contents,
    contents_of,
    find_stranger,
    take_part,
)
from exporters.checkpoint.parts import FOLDERS, TOKENIZERS, make_part, read_folder
from exporters.checkpoint.tensors import Weights, read_entries, read_stored, same_values
from exporters.checkpoint.weight_files import PICKLES, list_weight_files
from fluxdeploy.errors import CheckpointError

__all__ = ["open_single_file"]

_SCHEDULE = "scheduler/scheduler_config.json"

_COMPARED = 4096
"""Elements of each tensor that are compared where a whole part would take too long."""


def open_single_file(path: Path, base: Path | None) -> Checkpoint:
    """Open a transformer's file, or the folder of one, with the parts inside and beside it.

    `base` is a folder of diffusers' layout for what is in neither. Raises `CheckpointError` for
    what is not read, and where two files hold different ones of a part.
    """
    root = path if path.is_dir() else path.parent
    roots = _Roots(root, base)
    found = _look_at(path)
    transformer = _transformer_file(path, found)
    parts: dict[str, Part] = {}
    absent: dict[str, str] = {}
    tensors = read_stored([transformer])
    if (stranger := find_stranger(tensors)) is not None:
        raise CheckpointError(
            f"Tensor {stranger} in {transformer} is of no part of FLUX.1, and nothing would be "
            "done with it: the file is of another model, or holds two."
        )
    parts["transformer"] = make_part(
        "transformer", take_part(tensors, "transformer"), root / "config.json", transformer
    )
    _add_vae(parts, absent, roots, transformer, found)
    for name in ("clip", "t5"):
        _add_encoder(parts, absent, name, roots, transformer, found)
    scheduler, unused = _schedule(roots, parts["transformer"])
    return Checkpoint(root, "bfl", parts, absent, roots.tokenizers, scheduler, unused=unused)


@dataclass(frozen=True)
class _Roots:
    """Where the parts are that are not in the transformer's file: beside it, or in the base."""

    beside: Path
    base: Path | None

    def find(self, path: str) -> Path | None:
        """A file or folder of this name, or None."""
        roots = (self.beside, self.base)
        return next((root / path for root in roots if root and (root / path).exists()), None)

    @property
    def tokenizers(self) -> dict[str, Path]:
        """The folders that there are."""
        found = {name: self.find(folder) for name, folder in TOKENIZERS.items()}
        return {name: folder for name, folder in found.items() if folder is not None}

    def base_part(self, name: str) -> Part | None:
        """A part as the base has it, or None."""
        folder = None if self.base is None else self.base / FOLDERS[name]
        return read_folder(name, folder) if folder is not None and folder.is_dir() else None


def _schedule(roots: _Roots, transformer: Part) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """The config of the scheduler, if there is one, and a sentence where one is not followed."""
    file = roots.find(_SCHEDULE)
    if file is None:
        return None, ()
    other = roots.base / "transformer/config.json" if roots.base else None
    if other is not None and other.is_file() and file != roots.beside / _SCHEDULE:
        # Dev's folder does as the base of schnell, whose schedule is another one.
        guided = bool(read_json(other).get("guidance_embeds"))
        if guided != is_guided(transformer.weights):
            its, own = ("dev", "schnell") if guided else ("schnell", "dev")
            return None, (
                f"The schedule of the base {roots.base} is one of a FLUX.1-{its} and not followed: "
                f"the transformer is a {own}",
            )
    return read_json(file), ()


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
    roots: _Roots,
    transformer: Path,
    found: Mapping[Path, Contents],
) -> None:
    """Read the VAE: inside the transformer's file, in a file beside it, or in a folder vae/.

    Raises `CheckpointError` where two of them hold different ones.
    """
    inside = [transformer] if "vae" in found[transformer].parts else []
    beside, strangers = _vaes_beside(transformer, found, parts["transformer"].weights)
    sources = [(file, _part_of("vae", file, roots)) for file in (*inside, *beside)]
    folder = roots.beside / "vae"
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
    elif (of_base := roots.base_part("vae")) is not None:
        parts["vae"] = of_base
    absent["vae"] = (
        "ae.safetensors, or a folder vae/ with weights, must stand beside the transformer, or in a "
        "folder that --base names"
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


def _add_encoder(
    parts: dict[str, Part],
    absent: dict[str, str],
    name: str,
    roots: _Roots,
    transformer: Path,
    found: Mapping[Path, Contents],
) -> None:
    """Read a text encoder: in its folder, in the transformer's file, or in a file beside it.

    Raises `CheckpointError` where two of them hold different ones: a part of each tensor is
    compared, for all of T5 would take minutes.
    """
    folder = roots.beside / FOLDERS[name]
    files = [
        file
        for file, held in found.items()
        if name in held.parts and (file == transformer or "transformer" not in held.parts)
    ]
    # The transformer's own goes first.
    files.sort(key=lambda file: file != transformer)
    sources = [(file, _part_of(name, file, roots)) for file in files]
    # It may hold the config alone, for a file's weights.
    if folder.is_dir() and (list_weight_files(folder) or not sources):
        sources.insert(0, (folder, read_folder(name, folder)))
    if sources:
        (first, parts[name]), *others = sources
        for other, part in others:
            if not same_values(parts[name].weights, part.weights, _COMPARED):
                raise CheckpointError(
                    f"There are two different text encoders, in {first} and in {other}: leave the "
                    "one that belongs to the transformer."
                )
    elif (of_base := roots.base_part(name)) is not None:
        parts[name] = of_base
    absent[name] = (
        f"a folder {folder.name}/ with config.json and safetensors files was looked for, and a "
        "file of its tensors beside the transformer; a folder that has it can be named as --base"
    )


def _part_of(name: str, file: Path, roots: _Roots) -> Part:
    """A part in a file of its own or in one of several, with a config that lies elsewhere."""
    config = f"{FOLDERS[name]}/config.json"
    place = roots.find(config) or roots.beside / config
    return make_part(name, take_part(read_stored([file]), name), place, file)
