"""What a file is that is no plain FLUX.1 checkpoint, told by its first bytes, names and types.

The marks are names that the tool or family in question gives its tensors and that no part of
FLUX.1 has. Numbers between dots are written as `#`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from exporters.checkpoint.tasks import PIPELINES
from fluxdeploy.errors import CheckpointError

__all__ = [
    "Foreign",
    "Header",
    "check_bytes",
    "check_config",
    "check_part",
    "check_pipeline",
    "find_prefix",
    "has_names",
    "recognise",
]

Role = Literal["quantized", "adapter", "family", "vae", "texts"]


class _Entry(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...


Header = Mapping[str, _Entry]
"""Types and shapes of a file's tensors by name, wherever they were read from."""

_PLAIN_FILES = (
    "Quantized weights are not read: use the checkpoint's bfloat16, float16 or FP8 file, and let "
    "--precision quantize it"
)
_MERGE = (
    "A LoRA is no checkpoint: give the checkpoint that it changes, and the LoRA's file with --lora"
)


@dataclass(frozen=True)
class _Kind:
    """A kind of file: what such a file is, what its tensors tell of others, and what to do."""

    role: Role
    file: str
    tensor: str
    advice: str
    marks: re.Pattern[str]


def _quantized(by: str, marks: str) -> _Kind:
    file = f"quantized by {by}"
    return _Kind("quantized", file, f"the weights are {file}", _PLAIN_FILES, re.compile(marks))


def _adapter(name: str, marks: str) -> _Kind:
    advice = "It is not read: give a checkpoint of FLUX.1 without it"
    return _Kind("adapter", name, f"it is part of {name}", advice, re.compile(marks))


def _family(name: str, marks: str) -> _Kind:
    advice = "Models of other families are not read"
    file = f"a checkpoint of {name}"
    return _Kind("family", file, f"it is part of {file}", advice, re.compile(marks))


def _vae(of: str, marks: str) -> _Kind:
    file = f"the VAE of {of}"
    return _Kind("vae", file, f"it is part of {file}", "It is not FLUX.1's", re.compile(marks))


_QUANTIZED = (
    _quantized("Nunchaku (SVDQuant)", r"\.(?:wscales|wtscale|wcscales|wzeros|smooth(?:_\w+)?)$"),
    # Its 4 bits are read, and its 8 bits are not.
    _quantized("bitsandbytes to 8 bits", r"\.(?:SCB|weight_format)$"),
    _quantized("Quanto", r"\._(?:data|scale|shift|zeropoint)(?:\.|$)"),
    _quantized("torchao", r"\._weight_\w+$|:_?(?:qdata|data|scale|zero_point)\b|\.tensor_impl\b"),
    _quantized("GPTQ or AWQ", r"\.(?:qweight|qzeros|g_idx)$"),
    _quantized("HQQ", r"\.W_q$"),
    _quantized("ExLlama", r"\.(?:q_weight|q_invperm|q_scale_max|trellis)$"),
    _quantized(
        "ModelOpt or ComfyUI to 4 bits", r"\.(?:weight|input|output)_quantizer\.|\.weight_scale_2$"
    ),
    _quantized("compressed-tensors", r"\.weight_(?:packed|zero_point|shape|global_scale)$"),
    _quantized("SDNQ", r"\.(?:svd_up|svd_down|zero_point)$"),
    _quantized("MLX", r"\.biases$"),
    _quantized("blocks of FP8 numbers", r"\.weight_scale_inv$"),
)

_ADAPTERS = (
    _Kind(
        "adapter",
        "a LoRA",
        "it is part of a LoRA that was not merged",
        _MERGE,
        re.compile(
            r"(?i:lora)|\.dora_scale$|lokr_w|hada_w|lycoris|\.oft_(?:diag|blocks)|\.base_layer\."
            r"|\.diff(?:_b)?$|\.ia3_"
        ),
    ),
    _adapter(
        "a ControlNet",
        r"(?:^|\.)(?:controlnet\w*|control_model|input_hint_block|pos_embed_input|control_layers"
        r"|control_\w*embedder)\.|lllite",
    ),
    _Kind(
        "adapter",
        "an IP-Adapter",
        "it is part of an IP-Adapter",
        "Give the checkpoint that it goes with, and the IP-Adapter's file with --ip-adapter",
        re.compile(
            r"ip_adapter|(?:^|\.)image_proj(?:_model)?\.|\.to_[kv]_ip\.|(?:^|\.)encoder_hid_proj\."
        ),
    ),
    _adapter("PuLID", r"(?:^|\.)pulid\w*\."),
    _Kind(
        "adapter",
        "FLUX.1 Redux",
        "it is part of FLUX.1 Redux",
        "A Redux is no checkpoint: give the checkpoint that draws, and the Redux's folder with "
        "--redux",
        re.compile(r"(?:^|\.)redux_(?:up|down)\."),
    ),
    _adapter("AnimateDiff", r"\.motion_modules\."),
    _adapter("a textual inversion", r"^(?:clip_l|clip_g|t5xxl|emb_params)$"),
)

_START = r"(?:^|\.)"
# In order: a name further down may also stand in the files of a family above it.
_FAMILIES = (
    _family(
        "FLUX.2", _START + r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)\."
    ),
    _family("FLUX.3", _START + r"(?:early_stream_modulations|ref_time_in)\."),
    _family("Chroma", _START + r"distilled_guidance_layer\."),
    _family(
        "HunyuanVideo or HunyuanImage",
        _START + r"(?:individual_token_refiner|token_refiner|byt5_in)\.|\.img_attn_qkv\.",
    ),
    _family(
        "Qwen-Image",
        r"(?:^|\.)transformer_blocks\.#\.(?:img|txt)_(?:mod|mlp)\.|(?:^|\.)(?:txt|text)_norm\.",
    ),
    _family("HiDream", _START + r"(?:double|single)_stream_blocks\."),
    _family("Stable Diffusion 3", _START + r"joint_blocks\."),
    _family("AuraFlow", _START + r"(?:double_layers|joint_transformer_blocks|cond_seq_linear)\."),
    _family("Mochi", _START + r"t5_yproj\.|\.qkv_[xy]\."),
    _family("CogVideoX or CogView", _START + r"patch_embed\.text_proj\."),
    _family(
        "Lumina or Z-Image",
        _START + r"(?:cap_embedder|context_refiner|noise_refiner|all_x_embedder)\.",
    ),
    _family("Hunyuan-DiT", _START + r"(?:mlp_t5|blocks\.#\.default_modulation)\."),
    _family(
        "Cosmos", _START + r"(?:x_embedder\.proj\.#|extra_pos_embedder|pos_embedder|llm_adapter)\."
    ),
    _family("PixArt or Sana", r"\.cross_attn\.(?:q|kv)_linear\."),
    _family(
        "Wan",
        _START + r"(?:head\.modulation$|blocks\.#\.cross_attn\.|time_projection\.)"
        r"|(?:^|\.)condition_embedder\.",
    ),
    _family("LTX-Video", _START + r"patchify_proj\."),
    _family(
        "PixArt, Sana or LTX-Video",
        _START + r"(?:adaln_single|caption_projection|caption_norm)\.|scale_shift_table$",
    ),
    _family("Stable Diffusion 3 or PixArt", _START + r"pos_embed\.(?:pos_embed$|proj\.)"),
    _family("Kandinsky 5", _START + r"(?:text|visual)_transformer_blocks\."),
    _family("Krea 2", _START + r"txtfusion\."),
    _family(
        "Stable Cascade",
        _START + r"(?:clip_txt_mapper|clip_mapper|effnet_mapper)\.|\.channelwise\.",
    ),
    _family(
        "Stable Diffusion XL", _START + r"(?:conditioner\.embedders|label_emb|add_embedding)\."
    ),
    _family(
        "Stable Diffusion",
        _START + r"(?:input_blocks|output_blocks|middle_block|cond_stage_model)\."
        r"|(?:down|up)_blocks\.#\.attentions\.|\.attn2\.to_[kv]\.",
    ),
    _family(
        "a language model",
        r"^(?:(?:model|language_model)\.)*layers\.#\.(?:self_attn|mlp)\.|^lm_head\.",
    ),
)

_VAES = (
    _vae("another family, with quant convolutions", _START + r"(?:post_)?quant_conv\."),
    _vae(
        "a video model",
        r"(?:encoder|decoder)\.(?:middle|upsamples|downsamples)\.#|\.conv_in\.conv\.",
    ),
    _vae("the tiny kind", r"^(?:encoder|decoder)\.layers\.#\.(?:weight|bias|conv)"),
)

_TEXTS = _Kind(
    "texts",
    "an all-in-one file with text encoders that are not FLUX.1's, or not under ComfyUI's names",
    "it is part of a text encoder inside an all-in-one file",
    "Those under text_encoders.clip_l. and text_encoders.t5xxl. are read: give such a file, or one "
    "that holds the transformer alone",
    re.compile(
        r"^(?:text_encoders\.(?!(?:clip_l|t5xxl)\.)|(?:text_encoder(?:_\d)?|cond_stage_model"
        r"|conditioner)\.)"
    ),
)

_KINDS = (*_QUANTIZED, *_ADAPTERS, *_FAMILIES, *_VAES, _TEXTS)
_INTEGERS = _quantized("some tool to integers or 4 bits", "$^")
_PACKED_TYPES = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F8_E8M0", "F6_E2M3", "F6_E3M2")

_MOST_FORMS = 20_000
"""Forms of names that are looked at: a checkpoint has some hundreds, a hostile header millions."""


@dataclass(frozen=True)
class Foreign:
    """A kind of file that is not read, and the tensor that tells it.

    role: quantized, adapter, family, vae (of another family) or texts (text encoders inside).
    """

    kind: _Kind
    tensor: str

    @property
    def role(self) -> Role:
        """What sort of file it is."""
        return self.kind.role

    def __str__(self) -> str:
        """After "it is": what the file is."""
        return f"{self.kind.file} (tensor {self.tensor})"

    @property
    def advice(self) -> str:
        """What to do, a sentence without its full stop."""
        return self.kind.advice

    def error(self, file: Path, part: str) -> CheckpointError:
        """The refusal of a part that has this tensor among its own."""
        return CheckpointError(
            f"Tensor {self.tensor} in {file} does not belong to a FLUX.1 {part}: "
            f"{self.kind.tensor}. {self.kind.advice}."
        )


def recognise(header: Header) -> Foreign | None:
    """What a file is that has tensors which no FLUX.1 checkpoint has; None where it has none."""
    return _first(header, _KINDS)


def check_part(header: Mapping[str, Any], part: str, file: Path) -> None:
    """Refuse a part whose tensors are quantized, or that holds a LoRA that was not merged.

    A transformer is also held against other families. `file` is named, or the one that the tensor
    itself knows. Raises `CheckpointError`.
    """
    kinds = _KINDS if part == "transformer" else (*_QUANTIZED, _ADAPTERS[0])
    found = _first(header, kinds)
    if found is not None:
        raise found.error(getattr(header[found.tensor], "file", file), part)
    prefix = find_prefix(header, part)
    if prefix is not None:
        raise CheckpointError(
            f"The tensors of the {part} in {file} carry the prefix {prefix!r}, which is not read: "
            "save them again under their names without it."
        )


_ANCHORS = {
    "transformer": r"(?:double_blocks|(?:single_)?transformer_blocks|single_blocks)\.\d+\.",
    "controlnet": r"(?:double_blocks|(?:single_)?transformer_blocks|single_blocks|input_blocks"
    r"|down_blocks)\.\d+\.",
    "vae": r"decoder\.conv_in\.weight$",
    "clip": r"(?:text_model\.)?encoder\.layers\.\d+\.self_attn\.",
    "t5": r"encoder\.block\.\d+\.layer\.\d+\.|enc\.blk\.\d+\.",
    "ip_adapter": r"image_proj\.|ip_adapter\.\d+\.",
    "ip_adapter_encoder": r"(?:vision_model\.)?encoder\.layers\.\d+\.self_attn\.",
    "redux": r"redux_(?:up|down)\.",
    "siglip": r"(?:vision_model\.)?encoder\.layers\.\d+\.self_attn\.",
}


def has_names(header: Mapping[str, Any], part: str) -> bool:
    """Whether the names of a part's tensors are in a header, beginning as they should."""
    anchor = re.compile(_ANCHORS[part])
    return any(anchor.match(name) for name in header)


def find_prefix(header: Mapping[str, Any], part: str) -> str | None:
    """What stands before the names of a part's tensors; None where they begin as they should."""
    if has_names(header, part):
        return None
    prefixed = re.compile(rf"(.*?\.)(?:{_ANCHORS[part]})")
    return next((match[1] for name in header if (match := prefixed.match(name))), None)


def _first(header: Header, kinds: Sequence[_Kind]) -> Foreign | None:
    forms = _forms(header)
    for kind in kinds:
        for form, name in forms.items():
            if kind.marks.search(form):
                return Foreign(kind, name)
    for name, entry in header.items():
        packed = len(entry.shape) > 1 and entry.dtype in _PACKED_TYPES
        # In 4 bits of bitsandbytes its bytes are of any type.
        if packed and name.endswith("weight") and f"{name}.absmax" not in header:
            return Foreign(_INTEGERS, name)
    return None


def _forms(header: Mapping[str, Any]) -> dict[str, str]:
    """The names with their numbers as `#`, and the first name of each form."""
    forms: dict[str, str] = {}
    for name in header:
        forms.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", name), name)
        if len(forms) == _MOST_FORMS:
            break
    return forms


def check_pipeline(index: Mapping[str, Any], checkpoint: Path | str) -> None:
    """Refuse a model_index.json of another pipeline. Raises `CheckpointError`."""
    kind = str(index.get("_class_name"))
    if kind == "FluxPriorReduxPipeline":
        raise CheckpointError(
            f"{checkpoint} holds FLUX.1 Redux, which draws nothing by itself: give the checkpoint "
            "that draws, and this folder with --redux."
        )
    if kind not in PIPELINES:
        raise CheckpointError(
            f"{checkpoint} holds a {kind}; of FLUX.1, {', '.join(PIPELINES)} checkpoints are read."
        )


# The library that a config says its weights are quantized by.
_LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "quanto": "Quanto",
    "torchao": "torchao",
    "gguf": "GGUF",
    "svdquant": "Nunchaku (SVDQuant)",
    "nunchaku": "Nunchaku (SVDQuant)",
}


def check_config(config: Mapping[str, Any], file: Path | str) -> None:
    """Refuse a part whose config.json says that it is quantized, but for 4 bits of bitsandbytes.

    Raises `CheckpointError`.
    """
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and method == "bitsandbytes" and settings.get("load_in_4bit"):
        return
    by = _LIBRARIES.get(str(method), str(method or "a library that it does not name"))
    raise CheckpointError(
        f"{file} has a quantization_config: the weights are quantized by {by}. {_PLAIN_FILES}."
    )


_STARTS = {
    b"version https://git-lfs": (
        "a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder"
    ),
    b"<!DOCTYPE": "a web page and no model: log in, or accept the licence, and download it again",
    b"<html": "a web page and no model: log in, or accept the licence, and download it again",
}
_LONGEST_START = max(map(len, _STARTS))


def check_bytes(file: Path) -> None:
    """Refuse a file that begins as something else: a pointer of Git LFS, a web page.

    Raises `CheckpointError`. What is missing, no regular file or unreadable passes: who reads the
    header says so.
    """
    if not file.is_file():
        return
    try:
        with open(file, "rb") as opened:
            start = opened.read(_LONGEST_START)
    except OSError:
        return
    for mark, what in _STARTS.items():
        if start.lower().startswith(mark.lower()):
            raise CheckpointError(f"{file} is {what}.")
