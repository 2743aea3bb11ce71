"""Which parts of a checkpoint a single file holds, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from exporters.checkpoint.foreign import Foreign, Header, find_prefix, has_names, recognise

__all__ = ["COMFY_PREFIX", "VAE_PREFIXES", "Contents", "contents_of", "without_prefix"]

COMFY_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("vae.", "first_stage_model.")

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
    names = without_prefix(header, (COMFY_PREFIX,)).keys()
    parts = set()
    has_blocks = any(name.startswith(_BLOCKS) for name in names)
    if has_blocks and role != "family" and (role != "adapter" or _is_whole(names)):
        parts.add("transformer")
    latents = None
    for prefix in ("", *VAE_PREFIXES):
        entry = header.get(f"{prefix}decoder.conv_in.weight")
        # A video's VAE has convolutions of five axes.
        if entry is not None and len(entry.shape) == 4 and role not in ("family", "vae"):
            parts.add("vae")
            latents = entry.shape[1]
    if not parts and role is None:
        parts.update(part for part in ("clip", "t5") if has_names(header, part))
    prefix_before = None if has_blocks else find_prefix(header, "transformer")
    return Contents(frozenset(parts), latents, foreign, prefix_before)


def without_prefix(tensors: Mapping[str, _T], prefixes: Iterable[str]) -> Mapping[str, _T]:
    """The tensors under the first prefix that has any, without it; all where none has."""
    for prefix in prefixes:
        inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if inside:
            return inside
    return tensors


def _is_whole(names: Iterable[str]) -> bool:
    found = set(names)
    return any(ends <= found for ends in _ENDS)
