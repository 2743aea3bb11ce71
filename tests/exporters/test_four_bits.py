"""Weights in 4 bits of bitsandbytes: its own packed tensors, and what it widens them to.

`four_bits.json` was made by bitsandbytes, whose package is too large to install for this: packed
tensors, and their numbers as its portable code gives them. Its code for AVX512 is off where a block
reaches over the end of a row.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.contents import contents_of
from exporters.checkpoint.four_bits import attach_blocks
from exporters.checkpoint.tensors import StoredTensor, read_entries, read_stored
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.errors import CheckpointError
from tests.exporters.conftest import TRANSFORMER, edit_json

MADE: dict[str, Any] = json.loads(Path(__file__).with_name("four_bits.json").read_text())
Packed = dict[str, tuple[str, list[int], bytes]]
STATE = "weight.quant_state.bitsandbytes__nf4"


def packed(name: str) -> Packed:
    """Tensors by name: type, shape, bytes."""
    found = {}
    for key, (dtype, shape, data) in MADE["weights"][name]["tensors"].items():
        text = MADE["maps"][data["map"]] if isinstance(data, dict) else data
        found[key] = (dtype, shape, base64.b64decode(text))
    return found


def write(path: Path, tensors: Packed) -> Path:
    with TensorFileWriter(path, [(n, d, s) for n, (d, s, _) in tensors.items()]) as writer:
        for _, _, data in tensors.values():
            writer.write(data)
    return path


def attach(folder: Path, tensors: Packed) -> dict[str, StoredTensor]:
    return attach_blocks(read_stored([write(folder / "nf4.safetensors", tensors)]))


@pytest.mark.parametrize("name", MADE["weights"])
def test_bits_are_those_of_bitsandbytes(tmp_path: Path, name: str) -> None:
    attached = attach(tmp_path, packed(name))
    assert attached.keys() == {"weight"}
    weight = attached["weight"]
    assert weight.shape == tuple(MADE["weights"][name]["shape"])
    assert weight.stored_type == name[:3].upper()
    values = weight.read()
    expected = MADE["weights"][name]["float32"]
    if "bytes" in expected:
        assert values.tobytes() == base64.b64decode(expected["bytes"])
    else:
        assert hashlib.sha256(values.tobytes()).hexdigest() == expected["sha256"]
    rows = values.reshape(weight.shape)
    for start, stop in ((0, 1), (1, 3), (2, weight.shape[0])):
        assert (weight.rows(start, stop).read() == rows[start:stop].reshape(-1)).all()


def changed(key: str, *, dtype: str = "", data: bytes | None = None) -> Callable[[Packed], None]:
    def change(tensors: Packed) -> None:
        old = tensors[key]
        new = old[2] if data is None else data
        tensors[key] = (dtype or old[0], old[1] if data is None else [len(new)], new)

    return change


def state(**fields: Any) -> Callable[[Packed], None]:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [9, 96],
             "nested_blocksize": 256, "nested_offset": 0.5}  # fmt: skip
    kept = {key: value for key, value in (known | fields).items() if value is not None}
    return changed(STATE, data=json.dumps(kept).encode())


def without(key: str) -> Callable[[Packed], None]:
    return lambda tensors: tensors.pop(key) and None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("weight"), "has no weight beside it"),
        (without("weight.absmax"), r"has no weight\.absmax beside it"),
        (without("weight.quant_map"), r"has no weight\.quant_map beside it"),
        (without("weight.nested_absmax"), r"has no weight\.nested_absmax beside it"),
        (without(STATE), r"weight\.\w+ in .* has no quant_state beside it"),
        (changed(STATE, data=b"{"), "is not valid JSON"),
        (changed(STATE, data=b"[1]"), "is no JSON object"),
        (changed(STATE, data=b"\xff"), "is not valid JSON"),
        (changed(STATE, data=b" " * 5000), "is 5000 bytes of U8, and not a short text"),
        (changed(STATE, dtype="I8"), "of I8, and not a short text"),
        (state(shape=[9, 97]), r"has the shape \[9, 97\], and weight has 432 bytes"),
        (state(shape=[2**52, 9]), "has the shape"),
        (state(shape=[-9, -96]), "has the shape"),
        (state(shape="9"), "has the shape '9'"),
        (state(shape=None), "has the shape None"),
        (state(blocksize=48), "has the blocksize 48; 32, 64, 128"),
        (state(blocksize=0), "has the blocksize 0"),
        (state(blocksize=True), "has the blocksize True"),
        (state(blocksize=128), "has 14 numbers, and weight has 7 blocks"),
        (state(nested_blocksize=None), "has the nested_blocksize None"),
        (state(nested_offset="x"), "has the nested_offset 'x'"),
        (state(nested_offset=1e39), r"has the nested_offset 1e\+39"),
        (changed("weight.quant_map", data=bytes(60)), "60 numbers, and 16 are needed"),
        (changed("weight.nested_absmax", dtype="I32"), "stored as I32"),
        (changed("weight.absmax", dtype="I8"), "stored as I8"),
    ],
)
def test_packed_weights_that_are_not_whole(
    tmp_path: Path, change: Callable[[Packed], None], words: str
) -> None:
    tensors = packed("nf4-nested-9x96")
    if "60" in words:
        tensors["weight.quant_map"] = ("U8", [60], bytes(60))
    change(tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        attach(tmp_path, tensors)
    assert "nf4.safetensors" in str(caught.value)


def test_a_transformer_in_4_bits(copy: Path, opened: Checkpoint) -> None:
    """As diffusers saves one: a config that says so, and tensors beside each weight."""
    name = "transformer_blocks.0.attn.to_q.weight"
    file = copy / TRANSFORMER
    codes = np.random.default_rng(0).integers(0, 256, 96 * 96 // 2, np.uint8)
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 96]}
    levels = np.linspace(-1, 1, 16, dtype="<f4")
    tensors: Packed = {
        key: (entry.dtype, list(entry.shape), b"") for key, entry in read_entries(file).items()
    }
    raw = file.read_bytes()
    for key, entry in read_entries(file).items():
        data = raw[entry.offset : entry.offset + entry.nbytes]
        tensors[key] = (entry.dtype, list(entry.shape), data)
    tensors[name] = ("U8", [96 * 96 // 2, 1], codes.tobytes())
    tensors[f"{name}.absmax"] = ("F32", [144], np.full(144, 2, "<f4").tobytes())
    tensors[f"{name}.quant_map"] = ("F32", [16], levels.tobytes())
    text = json.dumps(fields).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", [len(text)], text)
    write(file, tensors)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(copy / "transformer/config.json", quantization_config=settings)
    assert contents_of(read_entries(file)).foreign is None
    read = open_checkpoint(copy)
    assert read.transformer == opened.transformer
    weights = read.part("transformer").weights
    assert weights.keys() == opened.part("transformer").weights.keys()
    expected = 2 * levels[np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)]
    assert (weights[name].read() == expected).all()
    assert read.rounded == {"transformer": ("NF4",)}
    assert any("stored as NF4 and widened" in notice for notice in read.notices)
    assert not any("quantization_config" in notice for notice in read.notices)
