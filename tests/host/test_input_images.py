"""Files that are not the pictures they seem: one sentence each, before they fill the memory."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.host.input_images import open_image, to_pixels


def png_of_size(width: int, height: int) -> bytes:
    """A PNG's head that claims a size; the pixels are not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def saved(path: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_the_hash_is_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    data = saved(path)
    image, digest = open_image(path)
    assert (image.mode, image.size) == ("RGB", (30, 40))
    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
    ids=["empty", "text", "a PNG's signature", "PostScript"],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a picture that can be read"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    data = saved(path)
    for kept in (len(data) // 2, 20):
        path.write_bytes(data[:kept])
        with pytest.raises(UsageError, match="is not a picture that can be read"):
            open_image(path)


@pytest.mark.parametrize("size", [(8193, 8192), (100_000, 1000), (60_000, 60_000)])
@pytest.mark.filterwarnings("error")
def test_a_picture_that_would_fill_the_memory_is_refused(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png_of_size(*size))
    with pytest.raises(UsageError, match=r"image\.png: The picture has more than 8192 x 8192"):
        open_image(path)


@pytest.mark.parametrize(
    "damage", [b"\x00M\x00*", b"MM\x00+", b"II\x2a\x00", b"", b"MM\x00*\xff\xff"]
)
def test_a_picture_with_broken_exif_is_taken_as_it_lies(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.new("RGB", (30, 40), "red").save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"Exif\0\0") + 6
    path.write_bytes(data[:start] + damage + data[start + len(damage) :])
    image, _ = open_image(path)
    assert to_pixels(image, 16, 16).shape == (1, 3, 16, 16)
    with Image.open(path) as lazy:
        assert to_pixels(lazy, 16, 16).shape == (1, 3, 16, 16)


def test_a_file_too_large_to_be_a_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.touch()
    os.truncate(path, (256 << 20) + 1)  # sparse
    with pytest.raises(FluxDeployError, match="has 268435457 bytes, and at most 268435456"):
        open_image(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (
        ("", "it is a folder"),
        ("pipe.png", "it is a named pipe"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(FluxDeployError, match=f"Cannot read the picture .*{name}: {words}"):
            open_image(tmp_path / name)
