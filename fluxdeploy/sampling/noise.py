"""Normal noise equal to that of PyTorch's CPU generator, so that a seed means the same picture.

Both libraries hold the same Mersenne Twister (mt19937); what differs is how its words become
normal values. The rules below are those of ATen's CPU `normal_` kernel for float32 tensors, and
tests/sampling/test_noise.py compares them with PyTorch itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError

__all__ = ["Generators", "TorchGenerator", "check_seed", "standard_normal"]

_BLOCK = 16
_MAX_SEED = 2**64 - 1


def check_seed(seed: int) -> None:
    """Raise `UsageError` unless `seed` is an integer from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise UsageError(
            f"The seed {shown(seed)} is not an integer. Give one from 0 to 2^64 - 1, or none "
            "to have one drawn."
        )
    if not 0 <= seed <= _MAX_SEED:
        raise UsageError(
            f"The seed {shown(seed)} is out of range. Seeds go from 0 to 2^64 - 1; leave it out "
            "to have one drawn."
        )


class TorchGenerator:
    """The draws of `torch.Generator("cpu").manual_seed(seed)`, one after the other.

    Like PyTorch, it keeps only the low 32 bits of the seed. Raises `UsageError` for a seed outside
    0 to 2^64 - 1.
    """

    def __init__(self, seed: int) -> None:
        check_seed(seed)
        self._words = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """What `torch.randn(shape, generator=...)` draws next: float32, within 4e-6 of it."""
        size = math.prod(shape)
        if size < _BLOCK:
            values = np.array([self._scalar() for _ in range(size)], np.float32)
        else:
            values = self._blocks(size)
        return values.reshape(tuple(shape))

    def _blocks(self, size: int) -> NDArray[np.float32]:
        whole = size - size % _BLOCK
        uniform = self._uniform(size)
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < size:
            # The last block may overlap the one before; PyTorch draws it afresh.
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """Uniform values in [0, 1): the low 24 bits of each word."""
        words = self._words.randint(0, 2**32, size=size, dtype=np.uint32)
        words &= np.uint32(0xFFFFFF)
        return words.astype(np.float32) * np.float32(2.0**-24)

    def _scalar(self) -> float:
        """One value of the path for small tensors: double precision, made in pairs.

        The second of a pair waits for the next small tensor, whatever is drawn between.
        """
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle = 2.0 * math.pi * self._uniform_double()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform_double()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform_double(self) -> float:
        """A uniform value in [0, 1): the low 53 bits of two words, the first one high."""
        high, low = self._words.randint(0, 2**32, size=2, dtype=np.uint32).tolist()
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


class Generators:
    """The generators of a call: one for all of its pictures, or one for each, as in diffusers.

    Raises `UsageError` for seeds outside 0 to 2^64 - 1.
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        self._one = None if isinstance(seed, Sequence) else TorchGenerator(seed)
        self._each = [TorchGenerator(each) for each in seed] if isinstance(seed, Sequence) else []

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """What comes next, float32; number k of the first axis from generator k of several."""
        if self._one is not None:
            return self._one.normal(shape)
        rows = [each.normal(shape[1:]) for each in self._each[: shape[0]]]
        return np.stack(rows)


def standard_normal(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """What `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` returns.

    float32, within 4e-6 of PyTorch on any CPU and 1e-6 on one with AVX2. Raises `UsageError` for a
    seed outside 0 to 2^64 - 1.
    """
    return TorchGenerator(seed).normal(shape)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Box-Muller over blocks of 16: 8 radii, then 8 angles, give 8 cosines, then 8 sines.

    Every intermediate is rounded to float32 where PyTorch rounds it. The transcendental functions
    go through float64, whose results round to the same float32 on every CPU; NumPy's float32 ones
    depend on the vector instructions at hand.
    """
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    log = np.log((np.float32(1.0) - pairs[:, 0]).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * log)
    angle = (np.float32(2.0 * math.pi) * pairs[:, 1]).astype(np.float64)
    normal = np.empty_like(pairs)
    np.multiply(radius, np.cos(angle).astype(np.float32), out=normal[:, 0])
    np.multiply(radius, np.sin(angle).astype(np.float32), out=normal[:, 1])
    return normal.reshape(-1)
