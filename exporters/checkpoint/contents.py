"""Which parts of a checkpoint a single file holds, by the names of its tensors.

ComfyUI's all-in-one files hold all four, each under prefixes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from exporters.checkpoint.foreign import Foreign, Header, find_prefix, has_names, recognise

__all__ = ["COMFY_PREFIX", "Contents", "contents_of", "find_stranger", "take_part"]

COMFY_PREFIX = "model.diffusion_model."

_PREFIXES = {
    "transformer": (COMFY_PREFIX,),
    "vae": ("vae.", "first_stage_model."),
    "clip": ("text_encoders.clip_l.", "clip_l."),
    "t5": ("text_encoders.t5xxl.", "t5xxl."),
}
"""What stands before the names of a part in a file that holds several."""

_ENCODERS = ("clip", "t5")
_WRAPPED = "transformer."
"""Before the names of a text encoder's network; what is beside it is ComfyUI's own."""

_BLOCKS = (
    "double_blocks.",
    "single_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)
# What a whole transformer begins and ends with, and adapters made of its blocks do not.
_ENDS = (
    {"img_in.weight", "final_layer.linear.weight"},
    {"x_embedder.weight", "proj_out.weight"},
)

_MARKS = ("scaled_fp8",)
"""What ComfyUI says of a whole file's weights, which their own types and scales say too."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    parts: of `transformer`, `vae`, `clip` and `t5`, those that can be read from it. latents: the
    channels that its VAE has. foreign: what the file is besides, or instead. prefix: what stands
    before the names of a transformer that is not read for it.
    """

    parts: frozenset[str]
    latents: int | None
    foreign: Foreign | None
    prefix: str | None

    def __str__(self) -> str:
        """After "it is": what the file is that holds no FLUX.1 transformer."""
        if self.foreign is not None:
            return str(self.foreign)
        if self.prefix is not None:
            return f"a transformer under the prefix {self.prefix!r}"
        if "vae" in self.parts:
            return "a VAE"
        if self.parts:
            return "a text encoder"
        return "of no known kind"

    @property
    def advice(self) -> str:
        """What to do with such a file, a sentence without its full stop; nothing where unknown."""
        if self.foreign is not None:
            return self.foreign.advice
        return "" if self.prefix is None else "Save it again under names without that prefix"


def contents_of(header: Header) -> Contents:
    """Tell a file by its tensors' names, types and shapes."""
    foreign = recognise(header)
    role = None if foreign is None else foreign.role
    names = take_part(header, "transformer").keys()
    parts = set()
    has_blocks = any(name.startswith(_BLOCKS) for name in names)
    if has_blocks and role != "family" and (role != "adapter" or _is_whole(names)):
        parts.add("transformer")
    entry = take_part(header, "vae").get("decoder.conv_in.weight")
    latents = None
    # A video's VAE has convolutions of five axes.
    if entry is not None and len(entry.shape) == 4 and role not in ("family", "vae"):
        parts.add("vae")
        latents = entry.shape[1]
    for part in _ENCODERS:
        inside = _under(header, part)
        # A whole file of one has no prefix, and is nothing else.
        alone = not parts and role is None and has_names(header, part)
        if role != "family" and (inside or alone):
            parts.add(part)
    prefix_before = None if has_blocks else find_prefix(header, "transformer")
    return Contents(frozenset(parts), latents, foreign, prefix_before)


def take_part(tensors: Mapping[str, _T], part: str) -> Mapping[str, _T]:
    """A part's tensors in a file that may hold others, without the prefix that they have there.

    Where none has the part's prefix, those are the part's that have no other part's either.
    """
    inside = _under(tensors, part)
    if inside:
        return inside
    others = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}


def find_stranger(tensors: Mapping[str, _T]) -> str | None:
    """A tensor that is of no part, where the transformer has a prefix; None where there is none."""
    if not _under(tensors, "transformer"):
        return None
    known = tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)
    return next((n for n in tensors if not n.startswith(known) and n not in _MARKS), None)


def _under(tensors: Mapping[str, _T], part: str) -> dict[str, _T]:
    """The tensors under the first of a part's prefixes that has any, without it."""
    for prefix in _PREFIXES[part]:
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if inside and part in _ENCODERS:
            return {name.removeprefix(_WRAPPED): tensor for name, tensor in inside.items()}
        if inside:
            return inside
    return {}


def _is_whole(names: Iterable[str]) -> bool:
    found = set(names)
    return any(ends <= found for ends in _ENDS)
