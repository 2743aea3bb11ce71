"""What pictures are told in words: prompts for the text encoders, or embeddings in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import shown
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.numbers import read_numbers
from fluxdeploy.text.tokenizer import check_prompt

__all__ = ["Embeddings", "Prompts", "Text", "no_words", "read_texts"]

_MAX_PROMPT = 100_000
"""Characters of a prompt: 512 tokens are some 3,000, and reading a million takes seconds."""


@dataclass(frozen=True)
class Prompts:
    """P prompts: what CLIP reads of each, and what T5 does."""

    clip: tuple[str, ...]
    t5: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clip)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What the two encoders read of each prompt."""
        return list(zip(self.clip, self.t5, strict=True))

    @property
    def distinct(self) -> list[tuple[str, str]]:
        """The pairs without those that come again."""
        return list(dict.fromkeys(self.pairs))

    def repeated(self, count: int) -> Prompts:
        """All of them, so many times."""
        return Prompts(self.clip * count, self.t5 * count)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What the encoders would make of P prompts, U of them distinct.

    pooled: float32 [U, E'], CLIP's. text: float32 [U, S, E], T5's. rows: [P], those of each prompt.
    """

    pooled: NDArray[np.float32]
    text: NDArray[np.float32]
    rows: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def distinct(self) -> range:
        """Nothing looks for equal ones."""
        return range(len(self.pooled))

    def repeated(self, count: int) -> Embeddings:
        """All of them, so many times."""
        return replace(self, rows=np.tile(self.rows, count))


Text = Prompts | Embeddings


def no_words(manifest: Manifest, length: int) -> Embeddings:
    """One prompt of `length` tokens that says nothing: zeros, as in diffusers' prior of Redux."""
    widths = [_width(manifest, name) for name in ("pooled_embeddings", "text_embeddings")]
    pooled, text = (width if isinstance(width, int) else 1 for width in widths)
    zeros = np.zeros((1, length, text), np.float32)
    return Embeddings(np.zeros((1, pooled), np.float32), zeros, np.arange(1))


def read_texts(
    manifest: Manifest, arguments: Mapping[str, Any], otherwise: Text | None = None
) -> tuple[Text, Text | None]:
    """What a call's arguments say in words, and what they steer away from.

    arguments: `prompt`, `prompt_2`, `prompt_embeds`, `pooled_prompt_embeds`, and the same four of
    the negative prompts. otherwise: what stands for a prompt where there is none. Raises
    `UsageError` for what cannot be, or is said twice.
    """
    text = _read(manifest, arguments, "") or otherwise
    if text is None:
        raise UsageError("Give a `prompt`, or `prompt_embeds` with `pooled_prompt_embeds`.")
    negative = _read(manifest, arguments, "negative_")
    if negative is not None:
        if len(negative) == 1:
            negative = negative.repeated(len(text))
        _check_count("negative prompts", len(negative), len(text))
    return text, negative


def _read(manifest: Manifest, arguments: Mapping[str, Any], side: str) -> Text | None:
    words, pooled_words = f"{side}prompt_embeds", f"{side}pooled_prompt_embeds"
    prompts = (f"{side}prompt", f"{side}prompt_2")
    text, pooled = arguments[words], arguments[pooled_words]
    if text is None and pooled is None:
        return _read_prompts(*prompts, arguments)
    for name in prompts:
        if arguments[name] is not None:
            raise UsageError(f"`{name}` and embeddings are both given. Give one of them.")
    if text is None or pooled is None:
        missing, given = (words, pooled_words) if text is None else (pooled_words, words)
        raise UsageError(f"`{given}` needs `{missing}` too: the model reads both.")
    own = read_numbers(
        words, text, ("P", "S", _width(manifest, "text_embeddings")), "T5's for P prompts"
    )
    own_pooled = read_numbers(
        pooled_words,
        pooled,
        (len(own), _width(manifest, "pooled_embeddings")),
        f"CLIP's for the prompts of `{words}`",
    )
    return Embeddings(own_pooled, own, np.arange(len(own)))


def _width(manifest: Manifest, name: str) -> int | str:
    """How many numbers the conditioner takes of a token or a prompt; "E" where nobody says."""
    record = manifest.components.get("conditioner")
    for spec in () if record is None else record.inputs:
        if spec.name == name:
            return spec.shape[-1]
    return "E"


def _read_prompts(name: str, second: str, arguments: Mapping[str, Any]) -> Prompts | None:
    if arguments[name] is None:
        return None
    clip = _strings(name, arguments[name])
    # As in diffusers, whose empty one stands for the first.
    if arguments[second] is None or arguments[second] == "":
        return Prompts(clip, clip)
    t5 = _strings(second, arguments[second])
    if len(t5) == 1:
        t5 *= len(clip)
    _check_count(f"`{second}`", len(t5), len(clip))
    return Prompts(clip, t5)


def _check_count(what: str, count: int, prompts: int) -> None:
    if count != prompts:
        raise UsageError(
            f"There are {count} {what} for {prompts} prompts. Give one for all, or one for each."
        )


def _strings(name: str, value: object) -> tuple[str, ...]:
    prompts: Sequence[object] = (value,) if isinstance(value, str) else value  # type: ignore[assignment]
    if (
        not isinstance(prompts, (list, tuple))
        or not prompts
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise UsageError(
            f"`{name}` must be a string or a list of at least one string, not {shown(value)}."
        )
    for prompt in prompts:
        if len(prompt) > _MAX_PROMPT:
            raise UsageError(
                f"`{name}` has {len(prompt)} characters; it must have at most {_MAX_PROMPT}, of "
                "which the text encoders read a few hundred words."
            )
        check_prompt(prompt)
    # Of a subclass, the text alone.
    return tuple(str.__str__(prompt) for prompt in prompts)
