"""The block types of GGUF files, widened to float32: ggml's formats, bit for bit.

A block has a scale d, which is float16, and for some types a minimum; the types of K have a scale
for each 16 or 32 of a block's 256 numbers as well, of 4 or 6 bits. The order of the products is
ggml's own, for the last bit depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint.packing import Bytes, nibbles
from fluxdeploy.bundle.tensorfile import to_float32

__all__ = ["TYPES", "TYPE_NAMES", "GgmlType"]

_Record = NDArray[Any]
_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GgmlType:
    """A type of ggml, which implements `Packing`.

    fields: a block's bytes. numbers: what they stand for, [n, elements] of records [n].
    """

    name: str
    elements: int
    fields: np.dtype[Any]
    numbers: Callable[[_Record], _Floats]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.fields.itemsize

    def widen(self, blocks: Bytes, first: int) -> _Floats:
        """The numbers [n, elements] of blocks [n, block_bytes]."""
        records = np.ascontiguousarray(blocks).view(self.fields).reshape(-1)
        return self.numbers(records).reshape(-1, self.elements)


def _half(field: NDArray[Any]) -> _Floats:
    """A scale of each block: [n, 1]."""
    return field.astype(np.float32)[:, None]


def _plain(dtype: str) -> Callable[[_Record], _Floats]:
    return lambda block: to_float32(block["q"], dtype)


def _q4_0(block: _Record) -> _Floats:
    q = nibbles(block["q"]).reshape(-1, 32).astype(np.float32)
    return _half(block["d"]) * (q - 8)


def _q4_1(block: _Record) -> _Floats:
    q = nibbles(block["q"]).reshape(-1, 32).astype(np.float32)
    return _half(block["d"]) * q + _half(block["m"])


def _five_bits(block: _Record) -> _Floats:
    """Numbers of 0 to 31: the fifth bits of all stand in one integer."""
    fifth = (block["high"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    low = nibbles(block["q"]).reshape(-1, 32)
    return (low | fifth << 4).astype(np.float32)


def _q5_0(block: _Record) -> _Floats:
    return _half(block["d"]) * (_five_bits(block) - 16)


def _q5_1(block: _Record) -> _Floats:
    return _half(block["d"]) * _five_bits(block) + _half(block["m"])


def _q8_0(block: _Record) -> _Floats:
    return _half(block["d"]) * block["q"].astype(np.float32)


def _pairs(packed: Bytes) -> Bytes:
    """The four pairs of bits of bytes [n, k, 32], the lowest first: [n, k, 4, 32]."""
    return np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)


def _q2_k(block: _Record) -> _Floats:
    q = _pairs(block["q"].reshape(-1, 2, 32)).reshape(-1, 16, 16).astype(np.float32)
    scale = _half(block["d"]) * (block["scales"] & 15).astype(np.float32)
    least = _half(block["m"]) * (block["scales"] >> 4).astype(np.float32)
    return scale[..., None] * q - least[..., None]


def _q3_k(block: _Record) -> _Floats:
    low = _pairs(block["q"].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    # A set bit takes nothing off, and a clear one takes 4.
    third = np.stack([block["high"] >> bit & 1 for bit in range(8)], axis=-2)
    q = low.astype(np.float32) - 4 * (1 - third.astype(np.float32))
    # The low four bits of 16 scales are in 8 bytes, the high two of them in the 4 after these.
    least = nibbles(block["scales"][:, :8]).reshape(-1, 16)
    most = np.stack([block["scales"][:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)
    scales = (least | most.reshape(-1, 16) << 4).astype(np.float32) - 32
    return (_half(block["d"]) * scales)[..., None] * q.reshape(-1, 16, 16)


def _six_bits(packed: Bytes) -> tuple[_Floats, _Floats]:
    """Eight scales and eight minima, [n, 8] each, of the 12 bytes in which Q4_K and Q5_K pack them.

    The first four of each have bytes of their own, whose high bits are those of the last four.
    """
    one, two, rest = (packed[:, start : start + 4] for start in (0, 4, 8))
    scales = np.concatenate([one & 63, rest & 15 | one >> 6 << 4], axis=1)
    least = np.concatenate([two & 63, rest >> 4 | two >> 6 << 4], axis=1)
    return scales.astype(np.float32), least.astype(np.float32)


def _scaled(block: _Record, q: NDArray[Any]) -> _Floats:
    """Numbers [n, 8, 32] of Q4_K and Q5_K with their scales and minima."""
    scales, least = _six_bits(block["scales"])
    scale, minimum = _half(block["d"]) * scales, _half(block["m"]) * least
    return scale[..., None] * q.astype(np.float32) - minimum[..., None]


def _q4_k(block: _Record) -> _Floats:
    return _scaled(block, nibbles(block["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(block: _Record) -> _Floats:
    low = nibbles(block["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = np.stack([block["high"] >> bit & 1 for bit in range(8)], axis=-2)
    return _scaled(block, low | fifth << 4)


def _q6_k(block: _Record) -> _Floats:
    low = nibbles(block["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _pairs(block["high"].reshape(-1, 2, 32))
    q = (low | high << 4).astype(np.float32) - 32
    scale = _half(block["d"]) * block["scales"].astype(np.float32)
    return scale[..., None] * q.reshape(-1, 16, 16)


_D, _M = ("d", "<f2"), ("m", "<f2")


def _type(
    name: str, elements: int, numbers: Callable[[_Record], _Floats], *fields: tuple[Any, ...]
) -> GgmlType:
    return GgmlType(name, elements, np.dtype(list(fields)), numbers)


TYPES: Mapping[int, GgmlType] = {
    0: _type("F32", 1, _plain("F32"), ("q", "<f4")),
    1: _type("F16", 1, _plain("F16"), ("q", "<f2")),
    2: _type("Q4_0", 32, _q4_0, _D, ("q", "u1", 16)),
    3: _type("Q4_1", 32, _q4_1, _D, _M, ("q", "u1", 16)),
    6: _type("Q5_0", 32, _q5_0, _D, ("high", "<u4"), ("q", "u1", 16)),
    7: _type("Q5_1", 32, _q5_1, _D, _M, ("high", "<u4"), ("q", "u1", 16)),
    8: _type("Q8_0", 32, _q8_0, _D, ("q", "i1", 32)),
    10: _type("Q2_K", 256, _q2_k, ("scales", "u1", 16), ("q", "u1", 64), _D, _M),
    11: _type("Q3_K", 256, _q3_k, ("high", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), _D),
    12: _type("Q4_K", 256, _q4_k, _D, _M, ("scales", "u1", 12), ("q", "u1", 128)),
    13: _type(
        "Q5_K", 256, _q5_k, _D, _M, ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)
    ),
    14: _type("Q6_K", 256, _q6_k, ("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _D),
    30: _type("BF16", 1, _plain("BF16"), ("q", "<u2")),
}
"""The types that are read, by their numbers in a file."""

TYPE_NAMES: Mapping[int, str] = {
    **{number: each.name for number, each in TYPES.items()},
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""What the numbers of all types are called."""
