"""Every block type of GGUF files is widened to the bits that the package `gguf` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from exporters.checkpoint.ggml import TYPE_NAMES, TYPES
from exporters.checkpoint.tensors import read_stored
from tests.support.gguf_file import GgufFile, GgufTensor

gguf: Any = pytest.importorskip("gguf")
quants: Any = pytest.importorskip("gguf.quants")


def random_blocks(number: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks [blocks, bytes] of any bits, whose scales are finite."""
    kind = TYPES[number]
    raw = np.random.default_rng(seed).integers(0, 256, (blocks, kind.block_bytes), np.uint8)
    records = raw.view(kind.fields).reshape(-1)
    for name in set(kind.fields.names) & {"d", "m"}:
        records[name] = np.random.default_rng(seed + 1).normal(0, 0.01, blocks)
    if kind.elements == 1:
        halves = np.random.default_rng(seed).normal(0, 1, blocks).astype(np.float32)
        records["q"] = halves.view(np.uint32) >> 16 if kind.name == "BF16" else halves
    return raw


def reference(number: int, raw: np.ndarray) -> np.ndarray:
    """What the package makes of blocks: [blocks, numbers] float32."""
    kind = gguf.GGMLQuantizationType(number)
    return np.asarray(quants.dequantize(raw, kind), np.float32).reshape(len(raw), -1)


def test_sizes_and_names_are_those_of_the_package() -> None:
    for number, name in TYPE_NAMES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name
        if number in TYPES:
            known = TYPES[number]
            assert gguf.GGML_QUANT_SIZES[kind] == (known.elements, known.block_bytes)
            assert known.name == name


@pytest.mark.parametrize("number", TYPES, ids=[kind.name for kind in TYPES.values()])
def test_bits_are_those_of_the_package(number: int) -> None:
    raw = random_blocks(number, 300)
    if TYPES[number].name in ("F32", "F16"):
        expected = raw.view(TYPES[number].fields["q"]).astype(np.float32)
    else:
        expected = reference(number, raw)
    widened = TYPES[number].widen(raw, 0)
    assert np.isfinite(expected).all()
    assert expected.std() > 1e-3
    assert (widened.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("number", [8, 12, 14], ids=["Q8_0", "Q4_K", "Q6_K"])
def test_any_range_of_rows_and_of_numbers(tmp_path: Path, number: int) -> None:
    kind, rows, columns = TYPES[number], 5, 3 * TYPES[number].elements
    raw = random_blocks(number, rows * 3)
    expected = reference(number, raw).reshape(rows, columns)
    tensor = GgufTensor(number, (columns, rows), raw.tobytes())
    first = GgufTensor(0, (3,), bytes(12))
    path = GgufFile({"other": first, "w": tensor}).write(tmp_path / "x.gguf")
    stored = read_stored([path])["w"]
    assert stored.shape == (rows, columns)
    assert (stored.read().reshape(rows, columns) == expected).all()
    part = stored.rows(1, 4)
    assert part.shape == (3, columns)
    assert (part.read().reshape(3, columns) == expected[1:4]).all()
    half = kind.elements // 2
    for start, stop in ((0, half), (half, columns + 3), (columns * 2 - 1, columns * 3)):
        assert (part.read(start, stop) == expected[1:4].reshape(-1)[start:stop]).all()
    assert (part.rows(1, 2).read() == expected[2]).all()


def test_large_tensors_are_widened_in_pieces(tmp_path: Path) -> None:
    """Of more numbers than are widened at a time."""
    raw = random_blocks(8, 10_000)
    tensor = GgufTensor(8, (3200, 100), raw.tobytes())
    path = GgufFile({"w": tensor}).write(tmp_path / "x.gguf")
    assert (read_stored([path])["w"].read() == reference(8, raw).reshape(-1)).all()
