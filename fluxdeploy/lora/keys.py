"""Keys of LoRA files: the part that each is of, the module that it names, and what it holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Key", "Role", "parse_key", "refused_kind"]

Role = Literal["down", "up", "bias", "norm", "alpha", "difference"]


@dataclass(frozen=True)
class Key:
    """A key of a LoRA file.

    part: `transformer`, `clip` or `t5`.
    module: the module's name as the file has it, without its prefix.
    flat: that name has underscores in place of dots.
    """

    text: str
    part: str
    module: str
    flat: bool
    role: Role


_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"
"""PEFT may leave the adapter's name in the key: `lora_A.default.weight`."""

_ROLES: tuple[tuple[re.Pattern[str], dict[str, Role]], ...] = (
    (
        re.compile(rf"(?P<module>.+)\.lora_(?P<role>[AB]){_ADAPTER}(?:\.weight)?"),
        {"A": "down", "B": "up"},
    ),
    (
        re.compile(r"(?P<module>.+)\.lora_(?P<role>down|up)(?:\.weight)?"),
        {"down": "down", "up": "up"},
    ),
    (
        re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight"),
        {"down": "down", "up": "up"},
    ),
    # BFL's control LoRAs, and PEFT with `lora_bias`.
    (re.compile(rf"(?P<module>.+)\.lora_(?P<role>B){_ADAPTER}\.bias"), {"B": "bias"}),
    (re.compile(r"(?P<module>.+\.(?:query|key)_norm)\.(?P<role>scale)"), {"scale": "norm"}),
    (
        re.compile(r"(?P<module>.+\.norm_(?:added_)?[qk])\.(?P<role>weight)"),
        {"weight": "norm"},
    ),
    # XLabs: the module is an attention processor's `qkv_lora1`.
    (
        re.compile(r"(?P<module>.+_lora[12]?)\.(?P<role>down|up)\.weight"),
        {"down": "down", "up": "up"},
    ),
    (re.compile(r"(?P<module>.+)\.(?P<role>alpha)"), {"alpha": "alpha"}),
    (
        re.compile(r"(?P<module>.+)\.(?P<role>diff|diff_b)"),
        {"diff": "difference", "diff_b": "difference"},
    ),
)

# In order: the first that a key begins with. Underscores at the end: the module has no dots.
_PREFIXES = (
    ("base_model.model.text_encoder.", "clip"),
    ("base_model.model.transformer.", "transformer"),
    ("base_model.model.diffusion_model.", "transformer"),
    ("base_model.model.", "transformer"),
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("unet.", "transformer"),
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lora_flux_", "transformer"),
    ("lycoris_", "transformer"),
    ("text_encoder.", "clip"),
    ("text_encoders.clip_l.transformer.", "clip"),
    ("lora_te_", "clip"),
    ("lora_te1_", "clip"),
    ("text_encoder_2.", "t5"),
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("lora_te2_", "t5"),
    ("lora_te3_", "t5"),
)

# What some trainers store that is no low-rank change.
_REFUSED = (
    ("DoRA", r"\.dora_scale$|\.lora_magnitude_vector(?:\.[\w-]+)*$"),
    ("LoKr", r"\.lokr_\w+(?:\.[\w-]+)*$"),
    ("LoHa", r"\.hada_\w+(?:\.[\w-]+)*$"),
    ("LoCon with a middle convolution", r"\.lora_mid(?:\.weight)?$"),
    ("OFT", r"\.(?:oft|boft)_\w+(?:\.[\w-]+)*$"),
    ("IA3", r"\.(?:ia3_\w+(?:\.[\w-]+)*|on_input)$"),
    ("GLoRA", r"\.(?:a1|a2|b1|b2|bm)\.weight$"),
    ("VeRA", r"\.?vera_\w+(?:\.[\w-]+)*$"),
    ("a LoRA of an embedding", r"\.lora_embedding_[AB]"),
    ("a LoRA with biases of its inner layers", r"\.lora_A(?:\.[\w-]+)?\.bias$"),
    ("LyCORIS with a scalar", r"\.scalar$"),
    ("PEFT with whole modules", r"\.(?:modules_to_save|base_layer|original_module)\."),
    ("ComfyUI with whole weights", r"\.set_weight$"),
    ("a ControlNet-like LoRA of other inputs", r"\.reshape_weight$"),
    ("an IP-Adapter", r"ip_adapter|\.to_[kv]_ip\."),
    ("an embedding of a textual inversion", r"^bundle_emb\."),
)
_REFUSED_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _REFUSED)


def refused_kind(text: str) -> str | None:
    """The name of what a key belongs to that is not read; None where it may be a LoRA's."""
    for name, pattern in _REFUSED_PATTERNS:
        if pattern.search(text):
            return name
    return None


def parse_key(text: str) -> Key | None:
    """A key taken apart; None where it does not end as the keys of LoRAs do."""
    for pattern, roles in _ROLES:
        match = pattern.fullmatch(text)
        if match:
            part, module, flat = _split_prefix(match["module"])
            return Key(text, part, module, flat, roles[match["role"]])
    return None


def _split_prefix(name: str) -> tuple[str, str, bool]:
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            module = name[len(prefix) :]
            # `lora_unet_` before a name with dots is met too.
            return part, module, prefix.endswith("_") and "." not in module
    return "transformer", name, False
