"""The T5 tokenizer: a SentencePiece Unigram model over NFKC-normalized text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import Unigram

from fluxdeploy.errors import CheckpointError
from fluxdeploy.text.folder import (
    Token,
    TokenizerFolder,
    add_special_tokens,
    open_folder,
    special_token_id,
    text_of,
)
from fluxdeploy.text.spiece import parse_sentencepiece
from fluxdeploy.text.tokenizer import Tokenizer

__all__ = ["load_t5_tokenizer", "t5_backend"]

_DEFAULTS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

_UNKNOWN_ID = 2
"""Fixed in transformers' T5Tokenizer, whatever the model file says."""


def load_t5_tokenizer(folder: Path, max_length: int = 512) -> Tokenizer:
    """The T5 tokenizer of `folder`: `tokenizer.json`, else `spiece.model`.

    Ids are those of transformers 5.23, which runs the `tokenizers` package and not
    SentencePiece itself. That differs from SentencePiece for special tokens written out in a
    prompt (one id each, spaces after them kept out), and in that the model file's own settings
    on whitespace and on the unknown token's id are not looked at. Of a `tokenizer.json` only the
    vocabulary, character map, added tokens and sides count. `model_max_length` does not either:
    FluxPipeline always names the length. Raises CheckpointError for a folder that is missing,
    broken or of another kind.
    """
    settings = open_folder(folder, ("spiece.model",), "T5Tokenizer", _DEFAULTS)
    try:
        model = settings.document_model("Unigram")
        if model is None:
            vocabulary, charsmap, additional = _from_spiece(settings)
        else:
            vocabulary = [(text, score) for text, score in model["vocab"]]
            charsmap = _document_charsmap(settings.document or {})
            additional = settings.additional
        settings.require_special_tokens({text for text, _ in vocabulary}, _DEFAULTS)
        extra = _sentinels(additional, settings.extra_ids)
        backend = t5_backend(vocabulary, charsmap)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for most that it refuses
        raise settings.broken(str(error)) from error
    add_special_tokens(backend, settings, extra if settings.extra is None else settings.extra)
    return Tokenizer(
        name="T5",
        backend=backend,
        prefix=(),
        suffix=(special_token_id(backend, settings, "eos_token"),),
        pad_id=special_token_id(backend, settings, "pad_token"),
        max_length=max_length,
        padding_side=settings.padding_side,
        truncation_side=settings.truncation_side,
    )


def t5_backend(vocabulary: Sequence[tuple[str, float]], charsmap: bytes) -> Backend:
    """T5's pipeline over (piece, log probability) pairs, without any special token."""
    backend = Backend(Unigram(list(vocabulary), unk_id=_UNKNOWN_ID, byte_fallback=False))
    if charsmap:
        _check_charsmap(charsmap)
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    return backend


def _from_spiece(
    settings: TokenizerFolder,
) -> tuple[list[tuple[str, float]], bytes, tuple[Token, ...] | None]:
    """Vocabulary, character map and additional special tokens of a `spiece.model`.

    The sentinels `<extra_id_...>` are no part of the file; they follow it, highest number first.
    """
    model = parse_sentencepiece((settings.path / "spiece.model").read_bytes())
    vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(settings.extra_ids))]
    additional = tuple(
        AddedToken(piece.text, normalized=False, special=piece.is_control)
        for piece in model.pieces
        if piece.is_control or piece.is_user_defined
    )
    return vocabulary, model.charsmap, additional


def _document_charsmap(document: Mapping[str, Any]) -> bytes:
    """The character map of a `tokenizer.json`; transformers looks at no other normalizer."""
    normalizer = document.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


def _check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError for a map whose first word, the bytes of its trie, cannot be right.

    The tokenizers package takes an empty trie and then aborts at the first prompt.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size == 0 or size % 4 or size > len(charsmap) - 4:
        raise ValueError("its map of characters is broken")


def _sentinels(additional: tuple[Token, ...] | None, count: int) -> tuple[Token, ...]:
    """The additional special tokens, with T5's sentinels where they lack them."""
    given = additional or ()
    present = sum("<extra_id_" in text_of(token) for token in given)
    if present == 0:
        return (*given, *(f"<extra_id_{i}>" for i in range(count)))
    if 0 < count != present:
        raise ValueError(f"extra_ids is {count} and it lists {present} tokens <extra_id_...>")
    return given
