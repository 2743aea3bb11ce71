"""The two tokenizers of a bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from fluxdeploy.bundle import Bundle
from fluxdeploy.errors import BundleError
from fluxdeploy.native import native_errors
from fluxdeploy.text.tokenizer import Tokenizer

__all__ = ["Tokenizers", "load_tokenizers"]

_MAX_TOKENIZER = 16 << 20
"""FLUX.1's have 3 MiB."""


_MAX_NUMBER = 1 << 24


@dataclass(frozen=True)
class Tokenizers:
    """FLUX.1's pair: CLIP for the pooled embedding, T5 for the tokens."""

    clip_tokenizer: Tokenizer
    t5_tokenizer: Tokenizer

    def clip(self, prompts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Input of the `clip` component: int32 [B, max_length], 77 for FLUX.1."""
        return self.clip_tokenizer.encode(prompts)

    def t5(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> npt.NDArray[np.int32]:
        """Input of the `t5` component: int32 [B, S] with S = `max_sequence_length`.

        Raises UsageError for more tokens than the bundle's T5 was made for.
        """
        return self.t5_tokenizer.encode(prompts, max_sequence_length)

    def lengths(self, prompt: str) -> tuple[int, int]:
        """Tokens of a prompt before cutting, special ones included: CLIP's, and T5's."""
        return self.clip_tokenizer.count(prompt), self.t5_tokenizer.count(prompt)


def load_tokenizers(bundle: Bundle) -> Tokenizers:
    """The tokenizers that the manifest records as `clip` and `t5`.

    Raises BundleError where the manifest has no such tokenizer, or its file cannot be read.
    """
    return Tokenizers(clip_tokenizer=_load(bundle, "clip"), t5_tokenizer=_load(bundle, "t5"))


def _load(bundle: Bundle, name: str) -> Tokenizer:
    record = bundle.manifest.tokenizers.get(name)
    if record is None:
        raise BundleError(f"The bundle {bundle.root} records no tokenizer {name}; build it again.")
    path = bundle.path(record.path)
    data = bundle.read(next(file for file in record.files if file.path == record.path))
    if len(data) > _MAX_TOKENIZER:
        raise BundleError(
            f"The tokenizer {path} has {len(data)} bytes, and at most {_MAX_TOKENIZER} are "
            "allowed. Build the bundle again."
        )
    if _has_larger_number(data):
        raise BundleError(
            f"The tokenizer {path} cannot be read: it has a number beyond {_MAX_NUMBER}, which no "
            "id or length is. Build the bundle again."
        )
    with native_errors(
        BundleError, f"The tokenizer {path} cannot be read", "Build the bundle again."
    ):
        backend = Backend.from_str(data.decode("utf-8"))
    return Tokenizer(name, backend, record)


def _has_larger_number(data: bytes) -> bool:
    """Whether a JSON text holds an integer past `_MAX_NUMBER`; not for what is no JSON.

    The native library makes room for as many tokens as an id says, and ends the process where
    memory does not do.
    """
    try:
        waiting = [json.loads(data)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
            return True
    return False
