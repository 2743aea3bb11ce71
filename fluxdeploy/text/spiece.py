"""Read `spiece.model`: pieces, scores and normalization map, without the protobuf package.

The file is a protobuf message, `sentencepiece_model.proto` in the SentencePiece repository.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Piece", "SentencePieceModel", "parse_sentencepiece"]

# ModelProto, its SentencePiece and its NormalizerSpec.
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_CHARSMAP = 2

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    kind: int

    @property
    def is_control(self) -> bool:
        return self.kind == _CONTROL

    @property
    def is_user_defined(self) -> bool:
        return self.kind == _USER_DEFINED


@dataclass(frozen=True)
class SentencePieceModel:
    """`charsmap` is the compiled normalization of the `tokenizers` package's Precompiled, or
    empty for text that is taken as it is."""

    pieces: tuple[Piece, ...]
    charsmap: bytes


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse the bytes of a SentencePiece model. Raises ValueError where they are none."""
    pieces: list[Piece] = []
    charsmap = b""
    complete = False
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_message(value)))
        elif number == _TRAINER_SPEC:
            complete = True
        elif number == _NORMALIZER_SPEC:
            for inner, content in _fields(_message(value)):
                if inner == _CHARSMAP:
                    charsmap = _message(content)
    # The trainer's settings follow the pieces: a file that was cut between two pieces has none.
    if not pieces or not complete:
        raise ValueError("it is cut off, or no SentencePiece model")
    return SentencePieceModel(pieces=tuple(pieces), charsmap=charsmap)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == _PIECE_TEXT:
            text = _message(value).decode("utf-8")
        elif number == _PIECE_SCORE:
            (score,) = struct.unpack("<f", _message(value))
        elif number == _PIECE_KIND and isinstance(value, int):
            kind = value
    return Piece(text=text, score=score, kind=kind)


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has the wrong type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for varints, the raw bytes for all else."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
        if position + size > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is longer than 64 bits")
