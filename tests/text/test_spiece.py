"""The reader of `spiece.model` sees what SentencePiece itself sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import normalizers

from fluxdeploy.text.spiece import parse_sentencepiece


def test_pieces_and_scores_equal_sentencepiece(demo: Mapping[str, Path]) -> None:
    data = (demo["model"] / "tokenizer_2" / "spiece.model").read_bytes()
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = parse_sentencepiece(data).pieces
    ids = range(reference.get_piece_size())
    assert [piece.text for piece in pieces] == [reference.id_to_piece(i) for i in ids]
    assert [piece.score for piece in pieces] == [reference.get_score(i) for i in ids]
    assert [piece.is_control for piece in pieces] == [reference.is_control(i) for i in ids]


def test_the_character_map_is_the_one_of_nfkc(demo: Mapping[str, Path]) -> None:
    model = parse_sentencepiece((demo["model"] / "tokenizer_2" / "spiece.model").read_bytes())
    assert normalizers.Precompiled(model.charsmap).normalize_str("ﬁ ｆ ① é") == "fi f 1 é"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no SentencePiece model"),
        (b"\x0a\x05abc", "cut off"),  # a field longer than the file
        (b"\x0a\x00", "cut off"),  # a piece and no trainer's settings
        (b"\x08" + b"\xff" * 10, "64 bits"),  # an endless number
        (b"\x0f", "wire type 7"),
        (b"\x08\x01\x12\x00", "wrong type"),  # the list of pieces as a number
        (b"\x0a\x03\x0a\x01\xff\x12\x00", "utf-8"),  # a piece that is no text
    ],
)
def test_other_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sentencepiece(data)
