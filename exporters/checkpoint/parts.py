"""The parts of a checkpoint, each in a folder of diffusers' layout or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporters.checkpoint.checkpoint import Part, read_json
from exporters.checkpoint.foreign import check_config, check_part
from exporters.checkpoint.four_bits import attach_blocks
from exporters.checkpoint.image_encoder_config import with_vision_names
from exporters.checkpoint.names import (
    canonical_controlnet,
    canonical_transformer,
    canonical_vae,
)
from exporters.checkpoint.tensors import StoredTensor, attach_scales, read_stored
from exporters.checkpoint.text_configs import FOLDERS as TEXT_FOLDERS
from exporters.checkpoint.text_configs import with_aliases
from exporters.checkpoint.weight_files import check_files, choose, read_index
from fluxdeploy.errors import CheckpointError

__all__ = ["FOLDERS", "TOKENIZERS", "make_part", "read_folder", "require_fit"]

TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
FOLDERS = {"transformer": "transformer", "vae": "vae", **TEXT_FOLDERS}
"""What diffusers' layout calls the folders of the parts."""


def read_folder(name: str, folder: Path) -> Part:
    """A part in a folder of diffusers' layout. Raises `CheckpointError` for what is not read.

    name: `transformer`, `vae`, `clip`, `t5`, `controlnet`, `ip_adapter_encoder`, `redux` or
        `siglip`.
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
    return make_part(name, read_stored(files, index), folder / "config.json", files[0])


def make_part(name: str, stored: Mapping[str, StoredTensor], config_file: Path, file: Path) -> Part:
    """A part of tensors as they are stored in `file` and others, and of its config."""
    config = read_json(config_file) if config_file.is_file() else None
    check_config(config or {}, config_file)
    if config is not None:
        # Of what the tensors themselves say.
        config.pop("quantization_config", None)
    check_part(stored, name, file)
    return Part(_canonical(name, attach_scales(attach_blocks(stored))), config)


def _canonical(name: str, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A part's tensors under the names of the graphs."""
    if name == "transformer":
        return canonical_transformer(tensors)
    if name == "controlnet":
        return canonical_controlnet(tensors)
    if name == "ip_adapter_encoder":
        return with_vision_names("clip", tensors)
    if name == "siglip":
        return with_vision_names("siglip", tensors)
    return canonical_vae(tensors) if name == "vae" else with_aliases(tensors, name)


def require_fit(network: str, has: Mapping[str, tuple[object, object]], other: str) -> None:
    """Raise `CheckpointError` for a network that joins a checkpoint and is not made for it.

    network: its name in the message. has: what it has and what the checkpoint needs, by what they
    are. other: what it was made for then.
    """
    for what, (found, needed) in has.items():
        if found != needed:
            raise CheckpointError(
                f"{network} has {what} {found}, and the checkpoint {needed}: it was made for "
                f"{other}."
            )
