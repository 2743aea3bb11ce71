"""An IP-Adapter beside a checkpoint: found on the disk, and held against its transformer.

The kind that is read is XLabs', which diffusers loads too: a picture's CLIP embedding, projected to
a few tokens, and keys and values of these for each double-stream block.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from exporters.checkpoint.checkpoint import Checkpoint, Part
from exporters.checkpoint.config import count_blocks
from exporters.checkpoint.foreign import check_bytes, check_part, recognise
from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.ip_adapter_config import IpAdapterConfig
from exporters.checkpoint.parts import read_folder, require_fit
from exporters.checkpoint.pixels import read_pixels
from exporters.checkpoint.tensors import StoredTensor, Weights, attach_scales, read_stored
from exporters.checkpoint.weight_files import PICKLES, is_weight_file
from fluxdeploy.bundle.pixels import PixelSpec
from fluxdeploy.errors import CheckpointError

__all__ = ["adapter_pixels", "with_ip_adapter"]

_FILE = "ip_adapter.safetensors"
_ENCODER = "image_encoder"

_KIND = (
    "Give one of XLabs' kind, as diffusers loads it: ip_adapter.safetensors, or the folder that "
    "holds it"
)

_TASKS = ("text to image", "kontext")

_PROJECTION = re.compile(r"(?:ip_adapter_proj_model|image_proj)\.(proj|norm)\.(weight|bias)")
_BLOCK = re.compile(
    r"(?:double_blocks|ip_adapter)\.(\d{1,9})\.(?:processor\.)?"
    r"(?:ip_adapter_double_stream_([kv])_proj|to_([kv])_ip)\.(weight|bias)"
)


def with_ip_adapter(
    checkpoint: Checkpoint, path: Path | None, encoder: Path | None = None
) -> Checkpoint:
    """A checkpoint with the IP-Adapter at `path`, a file or its folder, as a part of it.

    encoder: the folder of the CLIP vision encoder whose embeddings it takes; where None it is
    `image_encoder` beside the adapter's file.

    Raises `CheckpointError` for what is none, and for one that was not made for this transformer or
    this encoder.
    """
    if path is None:
        if encoder is not None:
            raise CheckpointError(
                f"The image encoder {encoder} is for an IP-Adapter, and there is none. Name it "
                "with --ip-adapter, or leave out --image-encoder."
            )
        return checkpoint
    file = _find_file(path)
    part = _read(file)
    _check_fits(file, part, checkpoint)
    found = replace(
        checkpoint,
        parts={
            **checkpoint.parts,
            "ip_adapter": part,
            "ip_adapter_encoder": _read_encoder(file, encoder),
        },
        ip_adapter_name=file.name,
    )
    _check_encoder(file, found)
    return found


def _find_file(path: Path) -> Path:
    """The file of an IP-Adapter that is named by itself or by its folder."""
    if not path.exists():
        raise CheckpointError(f"The IP-Adapter {path} does not exist. {_KIND}.")
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(
                f"The IP-Adapter {path} is a pickle, which can run code when opened: only "
                "safetensors files are read. Convert it first."
            )
        return path
    if (path / "model_index.json").is_file():
        raise CheckpointError(f"{path} is a whole checkpoint and no IP-Adapter. {_KIND}.")
    names = sorted(file.name for file in path.iterdir() if is_weight_file(file.name))
    if _FILE in names:
        return path / _FILE
    if len(names) != 1:
        found = f"holds {', '.join(names)}" if names else "holds no safetensors file"
        raise CheckpointError(f"{path} {found}, and not the one file of an IP-Adapter. {_KIND}.")
    return path / names[0]


def _read(file: Path) -> Part:
    """An IP-Adapter's part. Raises `CheckpointError` for anything else."""
    check_bytes(file)
    stored = read_stored([file])
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        known = _canonical(name)
        if known in renamed:
            raise CheckpointError(
                f"Tensor {tensor.name} in {file} stands for the same as {renamed[known].name}: the "
                "file holds two IP-Adapters. Give one."
            )
        renamed[known] = tensor
    check_part(renamed, "ip_adapter", file)
    weights = attach_scales(renamed)
    if not any(map(_is_known, weights)):
        found = recognise(stored)
        what = f"{found}" if found is not None and found.role != "adapter" else "something else"
        raise CheckpointError(f"{file} is no IP-Adapter but {what}. {_KIND}.")
    for name, tensor in weights.items():
        if not _is_known(name):
            raise CheckpointError(
                f"Tensor {tensor.name} in {file} is none that an IP-Adapter of XLabs' kind has, "
                f"and nothing would be done with it. {_KIND}."
            )
    _check_complete(file, weights)
    return Part(weights, None)


def _check_complete(file: Path, weights: Weights) -> None:
    """Raise `CheckpointError` for an IP-Adapter that lacks tensors."""
    blocks = count_blocks(weights, r"ip_adapter\.(\d{1,9})\.")
    needed = ["image_proj.proj", "image_proj.norm"]
    needed += [f"ip_adapter.{block}.to_{kind}_ip" for block in range(blocks) for kind in "kv"]
    for name in (f"{module}.{each}" for module in needed for each in ("weight", "bias")):
        if name not in weights:
            raise CheckpointError(
                f"The IP-Adapter {file} has no tensor {name}, or what stands for it: it is "
                "incomplete, or of another kind. Download it again."
            )


def _read_encoder(file: Path, given: Path | None) -> Part:
    """The part of the image encoder that belongs to an IP-Adapter's file."""
    folder = file.parent / _ENCODER if given is None else given
    if not (folder / "config.json").is_file():
        what = "does not exist" if not folder.exists() else "has no config.json"
        raise CheckpointError(
            f"The image encoder {folder} {what}. Give the folder of the CLIP vision encoder that "
            "the IP-Adapter was made with, such as openai/clip-vit-large-patch14 for XLabs' own, "
            "with --image-encoder, or put it beside the IP-Adapter as image_encoder/."
        )
    return read_folder("ip_adapter_encoder", folder)


def _check_encoder(file: Path, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` where an IP-Adapter takes other embeddings than its encoder gives."""
    adapter, encoder = checkpoint.ip_adapter, checkpoint.ip_adapter_encoder
    assert adapter is not None
    assert encoder is not None
    if not encoder.projection:
        raise CheckpointError(
            "The image encoder has no tensor visual_projection.weight, which makes the embedding "
            "that an IP-Adapter takes: give one that was saved as CLIPVisionModelWithProjection, "
            "or a whole CLIP."
        )
    if adapter.embedding_width != encoder.projection:
        raise CheckpointError(
            f"The IP-Adapter {file} takes embeddings of a width of {adapter.embedding_width}, and "
            f"the image encoder gives {encoder.projection}: it was made with another encoder."
        )


def adapter_pixels(encoder: ImageEncoderConfig) -> PixelSpec:
    """How pictures become what the encoder reads.

    As diffusers has it, which makes CLIP's usual processor for the encoder's size and reads no
    preprocessor_config.json.
    """
    side = encoder.image_size
    usual = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    return read_pixels(usual, Path("CLIP's usual preprocessor_config.json"))


def _canonical(name: str) -> str:
    """A tensor's name in the graphs, whichever of two it has in the file; itself if none."""
    if match := _PROJECTION.fullmatch(name):
        return f"image_proj.{match[1]}.{match[2]}"
    if match := _BLOCK.fullmatch(name):
        return f"ip_adapter.{int(match[1])}.to_{match[2] or match[3]}_ip.{match[4]}"
    return name


def _is_known(name: str) -> bool:
    return _PROJECTION.fullmatch(name) is not None or _BLOCK.fullmatch(name) is not None


def _check_fits(file: Path, part: Part, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for an IP-Adapter that was made for another transformer."""
    if checkpoint.task not in _TASKS:
        raise CheckpointError(
            f"The checkpoint is one for {checkpoint.task}, and IP-Adapters go with "
            f"{' and '.join(_TASKS)}: build it without --ip-adapter."
        )
    config, transformer = IpAdapterConfig.of(part.weights), checkpoint.transformer
    has = {
        "double-stream blocks numbering": (config.blocks, transformer.double_blocks),
        "a width of": (config.width, transformer.width),
        "tokens as wide as text, of": (config.token_width, transformer.text_width),
    }
    require_fit(f"The IP-Adapter {file}", has, "another transformer")
