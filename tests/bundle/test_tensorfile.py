"""Safetensors headers of untrusted files, streamed writing, and float conversions."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from fluxdeploy.bundle.tensorfile import (
    DTYPE_BITS,
    TensorFileWriter,
    from_float32,
    read_header,
    read_tensor,
    to_float32,
    write_sparse,
)
from fluxdeploy.errors import BundleError, CheckpointError

DECLARED = [("a", "F32", (2, 3)), ("empty", "F16", (0, 7)), ("b", "BF16", (5,)), ("s", "I64", ())]


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _write(path: Path, chunks: list[bytes]) -> None:
    with TensorFileWriter(path, [("x", "U8", (6,)), ("y", "U8", (1,))]) as writer:
        for chunk in chunks:
            writer.write(chunk)


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_header_agrees_with_the_format_s_own_reader(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        "weight": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "eight": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    file = read_header(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    data = path.read_bytes()
    for name, tensor in tensors.items():
        entry = file.tensors[name]
        assert entry.shape == tuple(tensor.shape)
        stored = data[entry.offset : entry.offset + entry.nbytes]
        assert stored == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        values = read_tensor(file, name)
        assert values.shape == tuple(tensor.shape)
        if tensor.dtype in (torch.float32, torch.bool, torch.int64):
            np.testing.assert_array_equal(values, tensor.numpy())
        else:
            np.testing.assert_array_equal(to_float32(values, entry.dtype), tensor.float().numpy())


def test_written_file_is_read_by_the_format_s_own_reader(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.arange(5, dtype=np.int64)
    path = tmp_path / "out.safetensors"
    declared = [("a", "F32", (2, 3)), ("none", "F32", (0,)), ("b", "I64", (5,)), ("x", "I8", ())]
    with TensorFileWriter(path, declared, {"z": "ü", "a": "b"}) as writer:
        writer.write(a[:1])
        writer.write(a[1:].tobytes())
        writer.write(np.zeros((0,), np.float32))
        writer.write(b)
        assert not path.exists()
        writer.write(np.int8(-3))
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["a"], a)
    np.testing.assert_array_equal(loaded["b"], b)
    assert loaded["x"] == -3
    assert loaded["none"].shape == (0,)
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    file = read_header(path)
    assert file.metadata == {"a": "b", "z": "ü"}
    assert file.tensors["a"].offset % 8 == 0
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_written_bytes_do_not_depend_on_the_order_of_metadata(tmp_path: Path) -> None:
    for name, metadata in (("1", {"a": "1", "b": "2"}), ("2", {"b": "2", "a": "1"})):
        write_sparse(tmp_path / name, DECLARED, metadata)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([b"1234"], "'x' lacks 2 bytes"),
        ([b"12345678"], "8 bytes were given where the tensor 'x' has 6 left"),
        ([b"123456", b"1", b"12"], "after the last"),
        ([b"1234", b"123"], "'x' has 2 left"),
        ([b"123456"], "'y' lacks 1 bytes"),
    ],
)
def test_writer_leaves_nothing_where_bytes_are_missing_or_too_many(
    tmp_path: Path, chunks: list[bytes], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=message):
        _write(path, chunks)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_writer_says_why_the_disk_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"Cannot write .*no such file or folder"),
        TensorFileWriter(tmp_path / "none" / "x.safetensors", DECLARED),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    "declared",
    [[("a", "F32", (1,))] * 2, [("a", "float32", (1,))], [("__metadata__", "F32", (1,))]],
)
def test_writer_refuses_wrong_declarations(
    tmp_path: Path, declared: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    with pytest.raises(ValueError, match="tensor"):
        TensorFileWriter(tmp_path / "x", declared)


def test_sparse_file_of_a_full_size_checkpoint_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    declared = [(f"blocks.{i}.weight", "BF16", (12288, 3072)) for i in range(300)]
    write_sparse(path, declared)
    file = read_header(path)
    status = path.stat()
    assert status.st_size > 22e9
    assert status.st_blocks * 512 < 1 << 20
    assert file.tensors["blocks.299.weight"].nbytes == 12288 * 3072 * 2
    assert list(file.tensors) == [name for name, _, _ in declared]


def test_header_lists_tensors_in_any_order(tmp_path: Path) -> None:
    header = {"z": _tensor("U8", [2], 3, 5), "e": _tensor("U8", [0], 3, 3)}
    header["a"] = _tensor("U8", [3], 0, 3)
    file = read_header(_file(tmp_path / "x.safetensors", header, b"12345"))
    assert list(file.tensors) == ["a", "e", "z"]
    assert read_tensor(file, "z").tobytes() == b"45"


def test_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": _tensor("U8", [1], 0, 1)}).encode().ljust(0x280)
    path = _file(tmp_path / "x.safetensors", header, b"1")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path).tensors) == ["a"]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.safetensors", b"PK\x03\x04" + bytes(20)),
        ("a.safetensors", b"\x80\x02}q\x00X\x05\x00\x00\x00"),
        ("pytorch_model.bin", b"anything"),
        ("a.pt", b""),
        ("a.CKPT", b""),
    ],
)
def test_pickles_are_refused_because_they_can_run_code(
    tmp_path: Path, name: str, start: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(start)
    assert "a pickle can run code" in _refusal(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "missing.safetensors")
    assert "it is a folder" in _refusal(tmp_path)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "not a regular file" in _refusal(pipe)


def test_truncated_file_says_how_many_bytes_are_there(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.safetensors", {"a": _tensor("F32", [4], 0, 16)}, bytes(16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert "it has 11 bytes of tensor data, and its header promises 16" in _refusal(path)
    path.write_bytes(whole + b"x")
    assert "it has 17 bytes of tensor data, and its header promises 16" in _refusal(path)
    path.write_bytes(whole[:20])
    assert f"it has 20 bytes, and its header alone would end at {len(whole) - 16}" in _refusal(path)
    path.write_bytes(whole[:7])
    assert "it has 7 bytes" in _refusal(path)
    path.write_bytes((200_000_000).to_bytes(8, "little") + b"{")
    assert "at most 16777216 are allowed" in _refusal(path)


def test_file_cut_off_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sparse(path, [("a", "F32", (4,))])
    file = read_header(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="'a' is not whole"):
        read_tensor(file, "a")
    with pytest.raises(CheckpointError, match="no tensor named 'b'"):
        read_tensor(file, "b")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "does not start with a brace"),
        (b'{"a":', "not valid JSON"),
        (b'{"\xff":1}', "not valid JSON"),
        (b'{"\\ud800":1}', "not valid JSON"),
        (b'{"a":1,"a":2}', "the key 'a' occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":' + b"9" * 99 + b"}", "99 digits"),
        ({"__metadata__": {"a": 1}}, "not an object of strings"),
        ({"a": 1}, "no object for the tensor 'a'"),
        ({"a": _tensor("F7", [8], 0, 8)}, "unknown dtype 'F7'"),
        ({"a": _tensor("U8", [-1, -8], 0, 8)}, "the shape [-1, -8]"),
        ({"a": _tensor("U8", [True, 8], 0, 8)}, "the shape [True, 8]"),
        ({"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}}, "the shape [8.0]"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}}, "not two positions"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "offsets None"),
        ({"a": _tensor("U8", [8], 8, 0)}, "ends at byte 0, before its start at 8"),
        ({"a": _tensor("U8", [4], 0, 8)}, "takes 4 bytes, and its offsets give it 8"),
        ({"a": _tensor("U8", [4], 4, 8)}, "leaves a gap"),
        ({"a": _tensor("U8", [4], 0, 4), "b": _tensor("U8", [6], 2, 8)}, "overlaps"),
        ({"a": _tensor("U8", [4], 0, 4), "b": _tensor("U8", [3], 5, 8)}, "leaves a gap"),
        ({"a": _tensor("U8", [9], 0, 9)}, "8 bytes of tensor data, and its header promises 9"),
        ({"a": _tensor("U8", [2**62, 0, 9], 0, 0)}, "too large"),
        ({"a": _tensor("U8", [2**63, 2**63], 0, 8)}, "too large"),
        ({"a": _tensor("U8", [1] * 90_000, 0, 1)}, "90000 axes, and at most 32 are allowed"),
        ({"a": _tensor("U8", [10**19] * 50_000, 0, 1)}, "50000 axes"),
        ({"a": _tensor("U8", [[]] * 90_000, 0, 1)}, "the shape [[], [], ["),
        ({"a" * 10**6: _tensor("U8", [9], 0, 8)}, "takes 9 bytes, and its offsets give it 8"),
        ({"a": _tensor("x" * 10**6, [8], 0, 8)}, "unknown dtype 'xxx"),
        (b'{"a":[' + b"1," * 10**6 + b"1]}", "more than the 100000 values"),
        (b'{"__metadata__":{"a":' + b"9" * 10**6 + b"}}", "1000000 digits"),
        (b'{"' + b"a" * 10**6 + b'":1,"' + b"a" * 10**6 + b'":1}', "occurs twice"),
        ({"a": _tensor("F4", [1], 0, 0)}, "does not fill whole bytes"),
    ],
)
def test_header_that_lies_is_refused(tmp_path: Path, header: object, message: str) -> None:
    refusal = _refusal(_file(tmp_path / "x.safetensors", header, bytes(8)))
    assert message in refusal
    assert len(refusal) < 800


def test_random_damage_is_refused_or_leaves_a_true_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sparse(path, DECLARED, {"format": "pt"})
    whole = path.read_bytes()
    source = random.Random(7)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(damaged) - 1)
            kind = source.randrange(4)
            if kind == 0:
                damaged[place] = source.randrange(256)
            elif kind == 1:
                damaged[place] = source.choice(b'0123456789{}[],:"-.eE')
            elif kind == 2:
                del damaged[place : place + source.randint(1, 9)]
            else:
                damaged[place:place] = damaged[: source.randint(1, 9)]
        path.write_bytes(damaged)
        try:
            file = read_header(path)
        except CheckpointError:
            refused += 1
            continue
        for name, entry in file.tensors.items():
            assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(damaged)
            read_tensor(file, name)
    assert 500 < refused < 1500


def test_every_dtype_of_the_format_is_known() -> None:
    torch = pytest.importorskip("safetensors.torch")
    assert set(torch._TYPES) <= set(DTYPE_BITS)


def _same(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit by bit, but for the payloads of NaNs."""
    both_nan = np.isnan(mine) & np.isnan(theirs)
    assert mine.dtype == theirs.dtype
    kind = np.uint32 if mine.itemsize == 4 else np.uint16
    np.testing.assert_array_equal(mine.view(kind)[~both_nan], theirs.view(kind)[~both_nan])


@pytest.mark.parametrize(
    ("dtype", "name", "stored"),
    [
        ("F8_E4M3", "float8_e4m3fn", np.uint8),
        ("F8_E5M2", "float8_e5m2", np.uint8),
        ("BF16", "bfloat16", np.uint16),
        ("F16", "float16", np.uint16),
    ],
)
def test_widening_equals_torch_for_every_bit_pattern(
    dtype: str, name: str, stored: type[np.unsignedinteger]
) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(np.iinfo(stored).max + 1).astype(stored).reshape(2, -1)
    theirs = torch.from_numpy(codes).view(getattr(torch, name)).float().numpy()
    raw = codes.view(np.float16) if dtype == "F16" else codes
    _same(to_float32(raw, dtype), theirs)


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_narrowing_equals_torch(dtype: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    # Every upper half, with the lower halves around a tie; for float16 the ties lie at bit 12.
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    values = (upper | lower.astype(np.uint32)).view(np.float32)
    theirs = torch.from_numpy(values).to(getattr(torch, name))
    mine = from_float32(values, dtype)
    assert mine.shape == values.shape
    nan = np.isnan(values)
    bits = mine.view(np.uint16)
    np.testing.assert_array_equal(bits[~nan], theirs.view(torch.uint16).numpy()[~nan])
    assert np.isnan(to_float32(mine, dtype)[nan]).all()


def test_narrowing_leaves_its_input_alone() -> None:
    values = np.array([1.00390625, np.nan, -3.5], np.float32)
    kept = values.copy()
    from_float32(values, "BF16")
    np.testing.assert_array_equal(values, kept)
    assert from_float32(np.float32([[1.5]])[:, ::-1], "BF16").shape == (1, 1)


def test_float32_passes_through_and_other_dtypes_are_refused() -> None:
    values = np.ones(3, np.float32)
    assert to_float32(values, "F32") is values
    assert from_float32(values, "F32") is values
    with pytest.raises(CheckpointError, match="dtype I64 cannot be read as float32"):
        to_float32(np.zeros(1, np.int64), "I64")
    with pytest.raises(ValueError, match="F8_E4M3"):
        from_float32(values, "F8_E4M3")
