"""Weights that bitsandbytes stored in 4 bits, NF4 or FP4, widened to float32 as it does.

Beside a weight W stand W.quant_map, the 16 numbers that its codes mean; W.absmax, what those of
each block of 64 or so are multiplied with; and W.quant_state.bitsandbytes__nf4, JSON in bytes,
which has the shape. An absmax may be codes itself, of 256 numbers in W.nested_quant_map, in blocks
with a float each in W.nested_absmax and one nested_offset for all. Two codes are in a byte, the
first in its upper half, and run over the ends of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint.packing import Bytes
from exporters.checkpoint.tensors import StoredTensor
from fluxdeploy.bundle.typed_json import load_strict
from fluxdeploy.errors import CheckpointError

__all__ = ["attach_blocks"]

_STATES = {".quant_state.bitsandbytes__nf4": "NF4", ".quant_state.bitsandbytes__fp4": "FP4"}
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_STATE = 4096
_MAX_AXES = 32
_LARGEST = 3e38
"""Of float32, and a little less."""

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Nested:
    """Codes of absmaxes, which are U8."""

    codes: StoredTensor
    values: _Floats
    scales: StoredTensor
    elements: int
    offset: np.float32

    def read(self, start: int, stop: int) -> _Floats:
        codes = self.codes.read_bytes(start, stop)
        first, last = start // self.elements, -(-stop // self.elements)
        scales = np.repeat(self.scales.read(first, last), self.elements)
        skipped = start - first * self.elements
        return self.values[codes] * scales[skipped : skipped + codes.size] + self.offset


@dataclass(frozen=True)
class _FourBits:
    """How bitsandbytes packs a weight, which implements `Packing`."""

    name: str
    elements: int
    values: _Floats
    scales: StoredTensor | _Nested

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.elements // 2

    def widen(self, blocks: Bytes, first: int) -> _Floats:
        """The numbers [n, elements] of blocks [n, block_bytes], the first of which is `first`."""
        codes = np.stack([blocks >> 4, blocks & 15], axis=-1).reshape(-1, self.elements)
        scales = self.scales.read(first, first + len(blocks))
        return self.values[codes] * scales[:, None]


def attach_blocks(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Make weights of what bitsandbytes packed in 4 bits, and of the tensors beside it.

    Raises `CheckpointError` where these are missing, or contradict each other.
    """
    kept = dict(tensors)
    for name in tensors:
        ending = next((ending for ending in _STATES if name.endswith(ending)), None)
        if ending is not None:
            weight = name.removesuffix(ending)
            kept[weight] = _unpacked(kept, weight, ending)
            for beside in (ending, *_BESIDE):
                kept.pop(f"{weight}{beside}", None)
    for name, tensor in kept.items():
        if name.endswith(_BESIDE):
            raise _broken(tensor, "has no quant_state beside it")
    return kept


def _unpacked(tensors: Mapping[str, StoredTensor], weight: str, ending: str) -> StoredTensor:
    """The weight of a state of bitsandbytes, in its own shape."""
    state_tensor = tensors[f"{weight}{ending}"]
    stored = _find(tensors, weight, "", state_tensor)
    state = _read_state(state_tensor)
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
        or -(-math.prod(shape) // 2) != stored.nbytes
    ):
        raise _broken(
            state_tensor, f"has the shape {shape!r:.80}, and {weight} has {stored.nbytes} bytes"
        )
    elements = _block(state_tensor, state, "blocksize")
    blocks = -(-math.prod(shape) // elements)
    values = _numbers(_find(tensors, weight, ".quant_map", state_tensor), 16)
    absmax = _find(tensors, weight, ".absmax", state_tensor)
    scales: StoredTensor | _Nested
    if absmax.dtype == "U8":
        scales = _nested(tensors, weight, absmax, state_tensor, state)
    else:
        scales = absmax
        scales.check_readable()
    if math.prod(absmax.shape) != blocks:
        raise _broken(
            absmax, f"has {math.prod(absmax.shape)} numbers, and {weight} has {blocks} blocks"
        )
    packing = _FourBits(_STATES[ending], elements, values, scales)
    return dataclasses.replace(stored, shape=tuple(shape), packing=packing)


def _nested(
    tensors: Mapping[str, StoredTensor],
    weight: str,
    absmax: StoredTensor,
    state_tensor: StoredTensor,
    state: Mapping[str, Any],
) -> _Nested:
    elements = _block(state_tensor, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if (
        isinstance(offset, bool)
        or not isinstance(offset, (int, float))
        or not abs(offset) < _LARGEST
    ):
        raise _broken(state_tensor, f"has the nested_offset {offset!r:.80}, and no float32")
    scales = _find(tensors, weight, ".nested_absmax", state_tensor)
    blocks = -(-math.prod(absmax.shape) // elements)
    if math.prod(scales.shape) != blocks:
        raise _broken(
            scales,
            f"has {math.prod(scales.shape)} numbers, and {absmax.name} has {blocks} blocks",
        )
    scales.check_readable()
    values = _numbers(_find(tensors, weight, ".nested_quant_map", state_tensor), 256)
    return _Nested(absmax, values, scales, elements, np.float32(offset))


def _find(
    tensors: Mapping[str, StoredTensor], weight: str, ending: str, state: StoredTensor
) -> StoredTensor:
    found = tensors.get(f"{weight}{ending}")
    if found is None:
        raise _broken(state, f"has no {weight}{ending} beside it")
    return found


def _read_state(tensor: StoredTensor) -> Mapping[str, Any]:
    if tensor.dtype != "U8" or tensor.nbytes > _MAX_STATE:
        raise _broken(
            tensor, f"is {tensor.nbytes} bytes of {tensor.dtype}, and not a short text in U8"
        )
    try:
        state = load_strict(tensor.read_bytes(0, tensor.nbytes).tobytes().decode("utf-8"))
    except ValueError as error:
        raise _broken(tensor, f"is not valid JSON ({error})") from error
    if not isinstance(state, dict):
        raise _broken(tensor, "is no JSON object")
    return state


def _block(tensor: StoredTensor, state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or value not in _BLOCKS:
        allowed = ", ".join(map(str, _BLOCKS))
        raise _broken(tensor, f"has the {key} {value!r:.80}; {allowed} are allowed")
    return value


def _numbers(tensor: StoredTensor, count: int) -> _Floats:
    if math.prod(tensor.shape) != count:
        raise _broken(tensor, f"has {math.prod(tensor.shape)} numbers, and {count} are needed")
    return tensor.read()


def _broken(tensor: StoredTensor, problem: str) -> CheckpointError:
    return CheckpointError(
        f"Tensor {tensor.name} in {tensor.file}, of a weight that bitsandbytes packed, {problem}: "
        "the file is damaged or incomplete. Fetch it again."
    )
