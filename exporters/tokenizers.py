"""Tokenizers in their one form: a `tokenizer.json`, from whatever a checkpoint's folder holds.

Which files of a folder decide a token id, and in which order, is known to transformers alone. So
its own class reads the folder, as in diffusers' FluxPipeline, and what it made of it is written
down such that the `tokenizers` package gives the same ids without transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from exporters.tokenizer_files import KINDS, Kind, broken, checked_folder
from fluxdeploy.errors import CheckpointError
from fluxdeploy.native import native_errors

__all__ = ["CanonicalTokenizer", "CheckpointTokenizer", "canonical_tokenizer", "open_tokenizer"]

_UNLIMITED = 1e20
"""transformers saves "no limit" as 1e30 tokens."""

_LONGEST = 1 << 16
"""The most tokens to pad to; FLUX.1 has 512."""

_BASIC_PLANE = range(0x10000)
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class CanonicalTokenizer:
    """`text` is a whole `tokenizer.json`, without cutting and padding, and always the same bytes.

    `Tokenizer.from_str(text).encode(prompt, add_special_tokens=False)` gives a prompt's own ids.
    `prefix` and `suffix` are the ids around them, which cutting keeps; `max_length` is the most
    to pad to, and the sides are "left" or "right". `largest_id` is the largest of all.
    """

    text: str
    largest_id: int
    max_length: int
    pad_id: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    padding_side: str
    truncation_side: str


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A folder as transformers reads it: `loaded` is of its class for that kind of tokenizer."""

    folder: Path
    loaded: Any
    max_length: int

    def encode(self, prompts: Sequence[str], length: int | None = None) -> npt.NDArray[np.int32]:
        """int32 [B, length], or [B, max_length]: the ids that FluxPipeline gives its encoder."""
        rows = self.loaded(
            list(prompts),
            padding="max_length",
            max_length=self.max_length if length is None else length,
            truncation=True,
            return_tensors="np",
        ).input_ids
        return np.asarray(rows, np.int32)


def open_tokenizer(folder: Path, kind: str, max_length: int | None = None) -> CheckpointTokenizer:
    """The tokenizer in `folder`, of the kind `clip` or `t5`. Nothing is downloaded.

    Without `max_length`, CLIP pads as FluxPipeline does: to the folder's `model_max_length`, or to
    77 where that sets none. T5 then pads to 512; FluxPipeline always names the length there.
    Raises CheckpointError for a folder that is missing, broken or of another kind.
    """
    import transformers

    of_kind = KINDS[kind]
    with checked_folder(folder, of_kind) as files, _refusing(folder):
        loaded = getattr(transformers, of_kind.class_name).from_pretrained(
            files, local_files_only=True
        )
        _check_special_tokens(folder, loaded, of_kind)
        if not isinstance(loaded.model_max_length, (int, float)):
            raise broken(folder, f"its model_max_length is {loaded.model_max_length!r}")
        configured = None
        if kind == "clip" and loaded.model_max_length <= _UNLIMITED:
            configured = int(loaded.model_max_length)
        length = max_length or configured or of_kind.length
        if not 0 < length <= _LONGEST:
            raise broken(folder, f"it would pad to {length} tokens; 1 to {_LONGEST} are allowed")
    return CheckpointTokenizer(folder, loaded, length)


def canonical_tokenizer(
    folder: Path, kind: str, max_length: int | None = None
) -> CanonicalTokenizer:
    """The tokenizer in `folder` as one `tokenizer.json`; arguments as for `open_tokenizer`.

    Raises CheckpointError where `open_tokenizer` does, and where the ids would not be the same.
    """
    source = open_tokenizer(folder, kind, max_length)
    loaded, backend = source.loaded, source.loaded.backend_tokenizer
    with _refusing(folder):
        backend.no_truncation()
        backend.no_padding()
        document = json.loads(backend.to_str())
        added = document["added_tokens"]
        if backend.encode_special_tokens:
            known = backend.get_vocab(with_added_tokens=False)
            document["added_tokens"] = list(_without_special(added, known))
        text = _to_json(document)
        canonical = Backend.from_str(text)
        if json.loads(canonical.to_str())["model"] != json.loads(text)["model"]:
            raise broken(folder, "one tokenizer.json cannot hold its vocabulary")
        _check_equal(folder, backend, canonical, [token["content"] for token in added])
        prefix, suffix = _surroundings(canonical)
        around = len(prefix) + len(suffix)
        if around > source.max_length:
            raise broken(
                folder, f"it puts {around} tokens around a text and pads to {source.max_length}"
            )
    return CanonicalTokenizer(
        text=text,
        largest_id=max((*canonical.get_vocab().values(), loaded.pad_token_id)),
        max_length=source.max_length,
        pad_id=loaded.pad_token_id,
        prefix=prefix,
        suffix=suffix,
        padding_side=loaded.padding_side,
        truncation_side=loaded.truncation_side,
    )


def _refusing(folder: Path) -> AbstractContextManager[None]:
    """Makes a CheckpointError of whatever transformers and tokenizers raise for a broken folder."""
    return native_errors(
        CheckpointError,
        f"The tokenizer in {folder} cannot be used",
        "Copy the folder from the checkpoint again.",
    )


def _check_special_tokens(folder: Path, loaded: Any, kind: Kind) -> None:
    """Raise CheckpointError for a token that would get an id of its own.

    transformers appends it to the vocabulary, and the text encoder has no embedding for it.
    """
    vocabulary = loaded.backend_tokenizer.get_vocab(with_added_tokens=False)
    declared = {str(token) for token in loaded.init_kwargs["added_tokens_decoder"].values()}
    for name in kind.special:
        token = getattr(loaded, name)
        if token is None:
            raise broken(folder, f"it sets {name} to null")
        if token not in vocabulary and token not in declared:
            raise broken(folder, f"its vocabulary lacks {token!r}, its {name}")


def _without_special(
    added: Iterable[dict[str, Any]], vocabulary: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The added tokens of a tokenizer that reads special ones in a prompt as plain text.

    A file cannot say that, but can leave them out. Those past the vocabulary hold the place of the
    ids after them, and stay as text that no prompt has: in noncharacters of Unicode.
    """
    for token in added:
        if not token["special"]:
            yield token
        elif token["content"] not in vocabulary:
            yield {**token, "content": f"\ufdd0{token['content']}\ufdd1", "normalized": False}


def _to_json(document: dict[str, Any]) -> str:
    """Compact JSON, with scores in digits that give the same number in every reader."""
    model, rows = document["model"], ""
    if model["type"] == "Unigram":
        rows = ",".join(
            f"[{json.dumps(piece, ensure_ascii=False)},{_digits(score)}]"
            for piece, score in model["vocab"]
        )
        document = {**document, "model": {**model, "vocab": []}}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.replace('"vocab":[]', f'"vocab":[{rows}]', 1) + "\n"


def _digits(score: float) -> str:
    """Decimal digits of a score that every reader takes for the same number, and for `score`.

    The reader of the tokenizers package takes them as an integer m over 10**e and rounds twice,
    which for every eighth score is one unit off in the last place. Sums of the scores, which are
    float32, are then no longer exact: segmentations that tie, those of "!!!!!", come out unequal,
    and another one wins. One score in a thousand no digits reach; it moves by some 2**-40, with
    which sums are still exact.
    """
    sign = "-" if score < 0 else ""
    for step in range(16):
        size = abs(score) + step * 2.0**-40
        for decimal in _decimals(size):
            if _read_twice_rounded(decimal) == size == float(decimal):
                return f"{sign}{decimal:f}"
    return repr(score)


def _decimals(size: float) -> Iterator[Decimal]:
    """Decimal numbers next to `size`, the shortest one first."""
    shortest = Decimal(repr(size))
    yield shortest
    for digits in range(16, 21):
        places = digits - 1 - shortest.adjusted()
        near = size * float(f"1e{places}")
        for whole in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)):
            if whole.is_integer() and whole < 2**64:
                yield Decimal(int(whole)).scaleb(-places)


def _read_twice_rounded(decimal: Decimal) -> float:
    """What serde_json without its feature `float_roundtrip` reads."""
    _, digits, exponent = decimal.as_tuple()
    assert isinstance(exponent, int)
    whole, power = float(int("".join(map(str, digits)))), float(f"1e{abs(exponent)}")
    return whole / power if exponent < 0 else whole * power


def _check_equal(folder: Path, source: Backend, canonical: Backend, added: Sequence[str]) -> None:
    """Raise CheckpointError for a text, of all characters and added tokens, with other ids.

    This finds a map of characters whose native code panics, too.
    """
    characters = [chr(code) for code in _BASIC_PLANE if code not in _SURROGATES]
    texts = ["".join(characters[start : start + 64]) for start in range(0, len(characters), 64)]
    texts += [mark * 40 for mark in "!?.-_=a1"]
    texts += [*added, *map(" {} ".format, added)]
    texts.append("".join(added))
    for text in texts:
        # One by one: a batch starts threads, and tokenizers warns of every fork from then on.
        expected, ids = (b.encode(text, add_special_tokens=False).ids for b in (source, canonical))
        if ids != expected:
            raise broken(
                folder, f"one tokenizer.json cannot give its ids for the text {text!r:.80}"
            )


def _surroundings(canonical: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a prompt's own."""
    encoding = canonical.encode("a")
    own = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])
