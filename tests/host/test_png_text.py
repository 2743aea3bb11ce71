"""The text of a PNG costs no pixels and little memory, whatever the file promises."""

from __future__ import annotations

import dataclasses
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host.pictures import read_metadata, save_picture
from fluxdeploy.host.png_text import read_text
from tests.host.test_pictures import METADATA


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int = 8, height: int = 8) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )


END = chunk(b"IEND", b"")
SEED = chunk(b"tEXt", b"seed\x007")
PACKED = zlib.compress(b"7")
BOMB = zlib.compress(bytes(64 << 20))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image.png"


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        (SEED, "7"),
        (chunk(b"zTXt", b"seed\0\0" + PACKED), "7"),
        (chunk(b"iTXt", b"seed\0\0\0en\0Saat\0" + "七".encode()), "七"),
        (chunk(b"iTXt", b"seed\0\1\0\0\0" + PACKED), "7"),
        (chunk(b"IDAT", b"no pixels") + SEED, "7"),
        (SEED + chunk(b"tEXt", b"seed\x008"), "7"),
        (chunk(b"eXIf", bytes(100)) * 50 + SEED, "7"),
        (chunk(b"tEXt", b"seed\0\xe9"), "é"),
        (chunk(b"tEXt", b"seed"), ""),
    ],
)
def test_all_kinds_of_text_are_read_wherever_they_stand(
    path: Path, chunks: bytes, text: str
) -> None:
    path.write_bytes(header() + chunks + END)
    assert read_text(path)["seed"] == text


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("prompt", ["", "a cat", "é", "猫 🐈", "x" * 100_000])
def test_it_reads_what_pillow_writes(path: Path, prompt: str, compress: bool) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("prompt", prompt, zip=compress)
    chunks.add_itxt("long", prompt, "en", "lang", zip=compress)
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)
    assert read_text(path) == {"prompt": prompt, "long": prompt}


def test_pixels_are_not_decoded(path: Path) -> None:
    """A bomb of pixels, and pixels that are broken, take nothing."""
    save_picture(Image.new("RGB", (8, 8)), path, METADATA)
    data = path.read_bytes()
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    bomb = header(100_000, 100_000) + data[data.index(b"tEXt") - 4 : start]
    path.write_bytes(bomb + chunk(b"IDAT", BOMB) * 9 + data[end:])
    tracemalloc.start()
    assert read_metadata(path) == METADATA
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        (chunk(b"zTXt", b"seed\0\0" + BOMB), "more than 4 MiB of text"),
        (chunk(b"iTXt", b"seed\0\1\0\0\0" + BOMB), "more than 4 MiB of text"),
        (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 9, "more than 4 MiB of text"),
        (chunk(b"tEXt", b"seed\0" + bytes(5 << 20)), "more than 4 MiB of text"),
        (chunk(b"tEXt", b"a\0" + bytes(1 << 20)) * 5, "more than 4 MiB of text"),
        (struct.pack(">I", 2**31 - 1) + b"tEXtseed\x007", "cut off"),
        (struct.pack(">I", 2**32 - 1) + b"IDAT", "cut off"),
        (chunk(b"a0Ba", b"") * 100_001, "more than 100000 chunks"),
        (SEED[:-1] + b"\0", "a checksum does not match"),
        (chunk(b"zTXt", b"seed\0\0" + PACKED[:-3]), "packed text is cut off"),
        (chunk(b"zTXt", b"seed\0\0nothing packed"), "packed text is broken"),
        (chunk(b"iTXt", b"seed\0\0\0\0\0\xff"), "decode"),
        (chunk(b"IHDR", b""), "does not begin as a PNG does"),
        (b"", "cut off"),
    ],
)
def test_what_no_picture_has_is_refused(path: Path, chunks: bytes, words: str) -> None:
    path.write_bytes(header() + chunks + (END if chunks else b""))
    with pytest.raises(FluxDeployError, match=f"cannot be read as a PNG: .*{words}"):
        read_metadata(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "link to itself"])
def test_what_is_no_file_is_refused(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    with pytest.raises(FluxDeployError, match="cannot be read as a PNG"):
        read_metadata(path)


@pytest.mark.parametrize("value", ["", "1" * 100_000, "nan", "-inf", "1e999", "seven", "0x10"])
@pytest.mark.parametrize("field", ["seed", "guidance_scale", "height", "true_cfg_scale"])
def test_numbers_that_were_not_written_by_it_are_refused(
    path: Path, field: str, value: str
) -> None:
    changed = dataclasses.replace(METADATA, **{field: value})  # type: ignore[arg-type]
    save_picture(Image.new("RGB", (4, 4)), path, changed)
    with pytest.raises(FluxDeployError, match="its metadata is missing or was changed"):
        read_metadata(path)
