"""The text chunks of a PNG, read without its pixels and within bounds.

Pillow decodes all pixels for the text that stands behind them, and reads a chunk whole whatever its
length: a file of some kilobytes can cost minutes, and one of gigabytes as much memory. Here a chunk
without text is skipped, and text has bounds before and after it is unpacked. See
https://www.w3.org/TR/png-3/#11textinfo.
"""

from __future__ import annotations

import os
import zlib
from io import FileIO
from pathlib import Path

from fluxdeploy.bundle.files import open_regular

__all__ = ["read_text"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_MAX_CHUNKS = 100_000
_MAX_TEXT = 4 << 20
"""Bytes of all text chunks, in the file and unpacked."""


def read_text(path: Path) -> dict[str, str]:
    """The texts of a PNG by their keywords; of two under one keyword the first.

    Raises `ValueError`, saying what is wrong, for a file that is no whole PNG, or has more text or
    chunks than pictures have, and `OSError`.
    """
    with open_regular(path) as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise ValueError("it does not begin as a PNG does")
        return _read_chunks(file)


def _read_chunks(file: FileIO) -> dict[str, str]:
    size = os.fstat(file.fileno()).st_size
    found: dict[str, str] = {}
    left = _MAX_TEXT
    for index in range(_MAX_CHUNKS):
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or length + 4 > size - file.tell():
            raise ValueError("it is cut off")
        if (kind == b"IHDR") != (index == 0):
            raise ValueError("it does not begin as a PNG does")
        if kind == b"IEND":
            return found
        if kind not in _TEXT:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > left:
            raise ValueError(f"it has more than {_MAX_TEXT >> 20} MiB of text")
        body, checksum = file.read(length), file.read(4)
        if zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
            raise ValueError("its text was changed: a checksum does not match")
        keyword, text = _decode(kind, body, left)
        left -= length + len(text)
        found.setdefault(keyword, text)
    raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")


def _decode(kind: bytes, body: bytes, most: int) -> tuple[str, str]:
    """Keyword and text of a chunk."""
    keyword, _, rest = body.partition(b"\0")
    if kind == b"tEXt":
        return keyword.decode("latin-1"), rest.decode("latin-1")
    if kind == b"zTXt":  # a byte for the method, of which there is one
        return keyword.decode("latin-1"), _unpack(rest[1:], most).decode("latin-1")
    compressed, rest = rest[:1] == b"\1", rest[2:]
    _language, _, rest = rest.partition(b"\0")
    _translated, _, text = rest.partition(b"\0")
    if compressed:
        text = _unpack(text, most)
    return keyword.decode("latin-1"), text.decode("utf-8")


def _unpack(data: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"its packed text is broken ({error})") from error
    if len(text) > most:
        raise ValueError(f"it has more than {_MAX_TEXT >> 20} MiB of text")
    if not unpacker.eof:
        raise ValueError("its packed text is cut off")
    return text
