"""Which other model a LoRA was trained for, told by the names of its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["other_family"]

_B = r"(?:^|[._])"
"""Names stand between dots, or between underscores in files of kohya's scripts."""

# In order: a name further down may also stand in the files of a family above it.
_FAMILIES = (
    (
        "FLUX.2",
        _B + r"(?:double_stream_modulation|single_stream_modulation)|to_qkv_mlp_proj"
        r"|[._]ff(?:_context)?[._]linear_(?:in|out)",
    ),
    ("Chroma", _B + r"distilled_guidance_layer"),
    ("HunyuanVideo", _B + r"(?:individual_token_refiner|txt_in[._]c_embedder)|(?:img|txt)_mlp_fc"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mod|mlp)"),
    ("Stable Diffusion 3", _B + r"joint_blocks[._]|transformer_blocks[._]\d+[._]attn2[._]to_add"),
    ("HiDream", _B + r"(?:double|single)_stream_blocks"),
    ("Wan", _B + r"blocks[._]\d+[._](?:self_attn|cross_attn|ffn)"),
    ("Lumina or Z-Image", _B + r"(?:context_refiner|noise_refiner|layers[._]\d+[._]attention)"),
    ("LTX-Video", _B + r"(?:patchify_proj|caption_projection|adaln_single)"),
    (
        "Stable Diffusion XL",
        r"(?:^lora_te2_|^text_encoder_2\.)text_model[._]"
        r"|[._]transformer_blocks[._][2-9][._]attn[12][._]",
    ),
    (
        "Stable Diffusion",
        _B + r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]",
    ),
)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _FAMILIES)


def other_family(keys: Iterable[str]) -> str | None:
    """The family that some of the keys belong to and FLUX.1 has not; None where they tell none."""
    names = list(keys)
    for family, pattern in _PATTERNS:
        if any(pattern.search(name) for name in names):
            return family
    return None
