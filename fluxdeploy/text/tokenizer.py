"""Prompts to padded token ids, without state: safe to share between threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from fluxdeploy.arguments import check_integer, shown
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.native import native_errors

__all__ = ["Tokenizer", "check_prompt"]


@dataclass(frozen=True)
class Tokenizer:
    """A prompt's tokens, wrapped in the model's special tokens, cut and padded to one length.

    Equal to calling transformers' tokenizer with `padding="max_length"`, `truncation=True`.
    Cutting and padding are done here and not by the backend, whose settings are shared by all
    callers and would race when two threads ask for different lengths.
    """

    name: str
    backend: Backend
    record: TokenizerRecord

    def encode(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> npt.NDArray[np.int32]:
        """Token ids: int32 [B, max_length] for B prompts; the default length is the record's.

        Raises UsageError for prompts that are not a list of strings, and for a `max_length`
        outside what the tokenizer can fill.
        """
        prefix, suffix = self.record.prefix, self.record.suffix
        length = self._checked_length(max_length)
        room = length - len(prefix) - len(suffix)
        contents = self._tokenize(prompts)
        rows = np.full((len(contents), length), self.record.pad_id, dtype=np.int32)
        for row, content in zip(rows, contents, strict=True):
            if len(content) > room:
                start = len(content) - room if self.record.truncation_side == "left" else 0
                content = content[start : start + room]
            ids = [*prefix, *content, *suffix]
            start = length - len(ids) if self.record.padding_side == "left" else 0
            row[start : start + len(ids)] = ids
        return rows

    def count(self, prompt: str) -> int:
        """Number of tokens of a prompt before cutting, special tokens included.

        A prompt with more than `max_length` of them is cut by `encode`.
        """
        (content,) = self._tokenize([prompt])
        return len(self.record.prefix) + len(content) + len(self.record.suffix)

    def _checked_length(self, max_length: int | None) -> int:
        longest = self.record.max_length
        length = longest if max_length is None else check_integer("max_length", max_length, None)
        shortest = len(self.record.prefix) + len(self.record.suffix)
        if not shortest <= length <= longest:
            raise UsageError(
                f"The {self.name} tokenizer cannot pad to {shown(length)} tokens; "
                f"choose {shortest} to {longest}."
            )
        return length

    def _tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt alone, without special tokens around it."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise UsageError(
                f"Prompts must be a list of strings, not {shown(prompts)}; put the one prompt into "
                "a list."
            )
        for prompt in prompts:
            check_prompt(prompt)
        with native_errors(
            BundleError, f"The {self.name} tokenizer fails on a prompt", "Build the bundle again."
        ):
            encodings = self.backend.encode_batch_fast(list(prompts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]


def check_prompt(prompt: object) -> None:
    """Raise `UsageError` for what is no string of Unicode text."""
    if not isinstance(prompt, str):
        raise UsageError(f"A prompt must be a string, not {type(prompt).__name__}.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "A prompt holds half of a UTF-16 surrogate pair, which is no character; "
            "decode the text it came from as UTF-8 or UTF-16."
        ) from None
