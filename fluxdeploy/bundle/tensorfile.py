"""Safetensors files without torch: headers of untrusted files, streamed writing, NumPy arrays.

The format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors'
bytes without gaps, little-endian. See https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.files import disk_errors, open_regular, replacing
from fluxdeploy.bundle.typed_json import load_strict, shortened
from fluxdeploy.errors import CheckpointError

__all__ = [
    "DTYPE_BITS",
    "Declaration",
    "TensorEntry",
    "TensorFile",
    "TensorFileWriter",
    "from_float32",
    "read_header",
    "read_tensor",
    "to_float32",
    "write_sparse",
]

Array = NDArray[Any]
Declaration = tuple[str, str, Sequence[int]]
"""A tensor to be written: name, dtype, shape."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every dtype of the format and its bits per element."""

_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "C64": "<c8",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}

_MAX_HEADER = 16 << 20
"""A FLUX.1 with everything in one file has 0.3 MiB. Metadata, such as a small picture, may be long,
but the format's own limit, 100 MB, is more than can be read in a second."""

_MAX_AXES = 32
"""NumPy before 2.0 has no arrays of more."""

_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """What a file's header says; `tensors` are in the order of their bytes."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Read and check the header of a safetensors file; its data is never read.

    Raises `CheckpointError` for a file that is missing, truncated, a pickle, or whose header does
    not describe exactly the bytes that follow it.
    """
    source = Path(path)
    try:
        header, data_start, size = _read_header_bytes(source)
        entries, metadata = _parse_header(header, data_start, size - data_start)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {source}: {error.strerror or error}. Name a .safetensors file."
        ) from error
    except _HeaderError as error:
        raise CheckpointError(
            f"{source} is not a whole safetensors file: {error}. Download or export it again."
        ) from error
    return TensorFile(source, entries, metadata)


class _HeaderError(ValueError):
    """What is wrong with a header, to be completed with the file's name."""

    def __init__(self, problem: str) -> None:
        # It may quote the header, which may be one long name or list.
        super().__init__(shortened(problem))


def _read_header_bytes(path: Path) -> tuple[bytes, int, int]:
    """The header, the offset where the data starts, and the file's size, all in bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        _refuse_pickle(path, start)
        if len(start) < 8:
            raise _HeaderError(f"it has {len(start)} bytes, and the header's length alone takes 8")
        length = int.from_bytes(start[:8], "little")
        if length > _MAX_HEADER:
            raise _HeaderError(
                f"its header would have {length} bytes, and at most {_MAX_HEADER} are allowed"
            )
        if 8 + length > size:
            raise _HeaderError(
                f"it has {size} bytes, and its header alone would end at {8 + length}"
            )
        file.seek(8)
        header = file.read(length)
    if len(header) != length:
        raise _HeaderError("it was cut off while it was read")
    return header, 8 + length, size


def _refuse_pickle(path: Path, start: bytes) -> None:
    # A header of 640 bytes starts as a pickle does, so the brace after the length decides.
    looks_like = start[:2] == b"PK" or start[:1] == b"\x80"
    if path.suffix.lower() in _PICKLE_SUFFIXES or (looks_like and start[8:9] != b"{"):
        raise CheckpointError(
            f"{path} is a pickle or zip file, and only safetensors files are read, because a "
            "pickle can run code. Use the checkpoint's .safetensors files."
        )


def _parse_header(
    header: bytes, data_start: int, data_size: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if not header.startswith(b"{"):
        raise _HeaderError("its header does not start with a brace")
    try:
        plain = load_strict(header.decode("utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise _HeaderError(f"its header is not valid JSON ({error})") from None
    metadata = plain.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _HeaderError(f"its {_METADATA} is not an object of strings")
    entries = [_parse_entry(name, value, data_start) for name, value in plain.items()]
    # The header may list tensors in any order; an empty one lies before the next with bytes.
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            relation = "overlaps the one before it" if entry.offset < end else "leaves a gap"
            raise _HeaderError(
                f"the tensor {entry.name!r} {relation}: it starts at byte "
                f"{entry.offset - data_start} of the data instead of {end - data_start}"
            )
        end += entry.nbytes
    if end - data_start != data_size:
        raise _HeaderError(
            f"it has {data_size} bytes of tensor data, and its header promises {end - data_start}"
        )
    return {entry.name: entry for entry in entries}, metadata


def _parse_entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _HeaderError(f"its header has no object for the tensor {name!r}")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _HeaderError(f"the tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise _HeaderError(f"the tensor {name!r} has the shape {shape!r}, not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _HeaderError(f"the tensor {name!r} has the offsets {offsets!r}, not two positions")
    begin, end = offsets
    if begin > end:
        raise _HeaderError(f"the tensor {name!r} ends at byte {end}, before its start at {begin}")
    nbytes = _tensor_bytes(name, dtype, shape)
    if end - begin != nbytes:
        raise _HeaderError(
            f"the tensor {name!r} of dtype {dtype} and shape {shape} takes {nbytes} bytes, and "
            f"its offsets give it {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _tensor_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    # Before the product, which would take long.
    if len(shape) > _MAX_AXES:
        raise _HeaderError(
            f"the tensor {name!r} has {len(shape)} axes, and at most {_MAX_AXES} are allowed"
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    # NumPy cannot hold sizes past 63 bits, even where another size is 0.
    if math.prod(max(size, 1) for size in shape) * DTYPE_BITS[dtype] >= 2**63:
        raise _HeaderError(f"the tensor {name!r} has a shape that is too large")
    if bits % 8:
        raise _HeaderError(f"the tensor {name!r} of dtype {dtype} does not fill whole bytes")
    return bits // 8


def read_tensor(file: TensorFile, name: str) -> Array:
    """One tensor's values, read into memory: an array of its shape.

    BF16 comes as uint16 and every 8-bit float as uint8, both raw (see `to_float32`); F4 and F6,
    which pack elements across bytes, come as flat uint8 [nbytes]. Raises `CheckpointError` for an
    unknown name and for a file that was cut off since its header was read.
    """
    entry = file.tensors.get(name)
    if entry is None:
        raise CheckpointError(f"{file.path} has no tensor named {name!r}; see its header.")
    # Read as bytes first: a byte other than 0 and 1 must not become a NumPy bool.
    stored = np.dtype("u1" if entry.dtype == "BOOL" else _NUMPY.get(entry.dtype, "u1"))
    count = entry.nbytes // stored.itemsize
    try:
        values = np.fromfile(file.path, stored, count, offset=entry.offset)
    except OSError as error:
        raise CheckpointError(f"Cannot read {file.path}: {error.strerror or error}.") from error
    if values.size != count:
        raise CheckpointError(f"{file.path} was cut off: the tensor {name!r} is not whole.")
    if entry.dtype == "BOOL":
        values = values != 0
    return values if DTYPE_BITS[entry.dtype] % 8 else values.reshape(entry.shape)


def to_float32(raw: Array, dtype: str) -> NDArray[np.float32]:
    """Stored values as float32 of the same shape, exactly; `raw` as `read_tensor` gives it.

    Reads F32 (returned as it is), F16, BF16, F8_E4M3 and F8_E5M2. Raises `CheckpointError` for
    other dtypes.
    """
    if dtype == "F32":
        return raw.astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.astype(np.float32)
    if dtype == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _float8_table(dtype)[raw]
    raise CheckpointError(
        f"A tensor of dtype {dtype} cannot be read as float32; allowed are F32, F16, BF16, "
        "F8_E4M3 and F8_E5M2."
    )


@cache
def _float8_table(dtype: str) -> NDArray[np.float32]:
    """The float32 value of each of the 256 codes, after the OCP 8-bit floating point formats."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of an IEEE float16
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, fraction = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    # Exponent 0 holds the subnormals, in steps of 2^-9; the bias is 7.
    subnormal = np.ldexp(fraction, -9)
    normal = np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7)
    values = np.where(exponent == 0, subnormal, normal)
    values[(codes & 127) == 127] = np.nan  # E4M3 has no infinities and one NaN
    table: NDArray[np.float32] = np.copysign(values, np.where(codes < 128, 1, -1))
    return table.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> Array:
    """float32 values as F32, F16 (float16) or BF16 (raw uint16), rounded to nearest, ties to even.

    NaN stays NaN; values past the range become infinities. Raises `ValueError` for other dtypes.
    """
    if dtype == "F32":
        return values.astype(np.float32, copy=False)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16)
    if dtype != "BF16":
        raise ValueError(f"float32 cannot be stored as {dtype}; allowed are F32, F16 and BF16")
    bits = np.array(values, np.float32, order="C").view(np.uint32)
    not_a_number = np.isnan(values)
    # Half of the last kept place, less one where that place is even: ties then go to even.
    bits += 0x7FFF + ((bits >> 16) & 1)
    bits >>= 16
    narrow: NDArray[np.uint16] = bits.astype(np.uint16)
    # Rounding could carry a NaN's payload into the sign, or away.
    narrow[not_a_number] = 0x7FC0
    return narrow


def _encode_header(
    tensors: Sequence[Declaration], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """A header with its length before it, and the bytes that each tensor takes, in order."""
    plain: dict[str, Any] = {}
    if metadata:
        plain[_METADATA] = {key: metadata[key] for key in sorted(metadata)}
    sizes: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in tensors:
        if name in sizes or name == _METADATA:
            raise ValueError(f"the tensor name {name!r} is used twice or reserved")
        if dtype not in DTYPE_BITS:
            raise ValueError(f"the tensor {name!r} has the unknown dtype {dtype!r}")
        sizes[name] = _tensor_bytes(name, dtype, shape)
        end = offset + sizes[name]
        plain[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER:
        raise ValueError(f"the header has {len(header)} bytes; at most {_MAX_HEADER} are allowed")
    return len(header).to_bytes(8, "little") + header, sizes


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor; it takes its name only when it is whole.

    A context manager. `write` takes the bytes of the declared tensors in their order; a chunk may
    be a part of a tensor but never reaches into the next. Where the block fails, or where bytes
    are missing at its end, nothing is left behind. The same input gives the same file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[Declaration],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`tensors` are (name, dtype, shape). Raises `ValueError` for a wrong declaration."""
        self._path = Path(path)
        self._header, sizes = _encode_header(tensors, metadata)
        self._left = [(name, size) for name, size in reversed(sizes.items()) if size]
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all bytes so far, as 64 hex digits: nobody has to read the file again for it."""
        return self._digest.hexdigest()

    def __enter__(self) -> TensorFileWriter:
        with disk_errors("write", self._path):
            self._file = self._stack.enter_context(replacing(self._path))
        with ExitStack() as on_error:
            on_error.push(self._stack)
            with disk_errors("write", self._path):
                self._file.write(self._header)
            on_error.pop_all()
        self._digest.update(self._header)
        return self

    def write(self, data: Any) -> None:
        """Append contiguous bytes, such as an array's, to the tensor that is not whole yet.

        Raises `ValueError` where they are more than it has left, and `BundleError` where the disk
        refuses.
        """
        if self._file is None:
            raise ValueError("the writer is not open")
        if memoryview(data).nbytes == 0:
            return
        view = memoryview(data).cast("B")
        if not self._left or view.nbytes > self._left[-1][1]:
            name, left = self._left[-1] if self._left else ("", 0)
            raise ValueError(
                f"{view.nbytes} bytes were given where the tensor {name!r} has {left} left"
                if name
                else f"{view.nbytes} bytes were given after the last tensor"
            )
        name, left = self._left.pop()
        if left > view.nbytes:
            self._left.append((name, left - view.nbytes))
        with disk_errors("write", self._path):
            self._file.write(view)
        self._digest.update(view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file = None
        if error is None and self._left:
            name, left = self._left[-1]
            error = ValueError(f"the tensor {name!r} lacks {left} bytes")
            self._stack.__exit__(type(error), error, None)
            raise error
        with disk_errors("write", self._path):
            self._stack.__exit__(kind, error, trace)


def write_sparse(
    path: str | os.PathLike[str],
    tensors: Sequence[Declaration],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of zeros that takes no room on the disk, whatever its size.

    Raises `ValueError` for a wrong declaration and `BundleError` where the disk refuses.
    """
    header, sizes = _encode_header(tensors, metadata)
    with disk_errors("write", path), replacing(path) as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes.values()))
