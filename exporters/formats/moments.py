"""Second moments of a linear's input, in few bytes, and what a rounding error's neighbours take on.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, algorithm 1, over some channels at a time: what is lost of one channel is made
up for by those after it, as far as they move together. Channels of different blocks are taken for
independent, so that memory goes with a block's size and not with an input's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluxdeploy.bundle.tensorfile import from_float32, to_float32

__all__ = ["BLOCK", "MomentsError", "decode_moments", "encode_moments", "error_factors"]

BLOCK = 32
"""Channels that are looked at together. Twice and four times as many gain 0.1 to 0.3 dB more."""

_DAMPING = 0.01
"""Of a block's mean variance, added to each: what was measured is of few tokens."""

_ONE = 127
"""The code of a correlation of 1."""


class MomentsError(ValueError):
    """Bytes that are no moments of such an input."""


def encode_moments(covariances: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Covariances [blocks, 32, 32] as bytes.

    Of each block the deviations as bfloat16, then the correlations below the diagonal, row by row,
    as 8-bit integers.
    """
    blocks = len(covariances)
    deviations = np.sqrt(np.einsum("bii->bi", covariances).clip(0))
    sizes = deviations[:, :, None] * deviations[:, None]
    correlations = np.divide(covariances, sizes, out=np.zeros_like(covariances), where=sizes > 0)
    codes = np.rint(correlations.clip(-1, 1) * _ONE).astype(np.int8)
    below = codes[(slice(None), *np.tril_indices(BLOCK, -1))].view(np.uint8)
    halves = from_float32(deviations.astype(np.float32).ravel(), "BF16").view(np.uint8)
    return np.concatenate([halves.reshape(blocks, -1), below], axis=1).ravel()


def decode_moments(raw: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """The covariances [blocks, 32, 32] of an input of so many channels, with zeros past the last.

    Raises `MomentsError` for bytes of another size or with deviations that are not finite.
    """
    blocks, below = math.ceil(columns / BLOCK), np.tril_indices(BLOCK, -1)
    width = 2 * BLOCK + len(below[0])
    if raw.size != blocks * width:
        raise MomentsError(f"has {raw.size} bytes, not {blocks * width}")
    rows = raw.reshape(blocks, width)
    deviations = to_float32(np.ascontiguousarray(rows[:, : 2 * BLOCK]).view(np.uint16), "BF16")
    if not np.isfinite(deviations).all():
        raise MomentsError("holds NaN or infinity")
    found = np.zeros((blocks, BLOCK, BLOCK), np.float32)
    found[(slice(None), *below)] = np.ascontiguousarray(rows[:, 2 * BLOCK :]).view(
        np.int8
    ) / np.float32(_ONE)
    found += found.transpose(0, 2, 1) + np.eye(BLOCK, dtype=np.float32)
    found *= deviations.reshape(blocks, BLOCK, 1) * deviations.reshape(blocks, 1, BLOCK)
    return found


def error_factors(covariances: NDArray[np.float32]) -> Tensor:
    """By how much of a channel's rounding error the later ones change, float32 [blocks, i, k].

    Row i of the upper Cholesky factor of a block's inverse covariance, over its own place.
    """
    exact = torch.from_numpy(covariances).double()
    mean = exact.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1)
    # Of codes, the least may come out below 0.
    values, vectors = torch.linalg.eigh(exact / mean[:, None, None])
    inverse = vectors / (values.clamp(min=0) + _DAMPING)[:, None] @ vectors.mT
    upper = torch.linalg.cholesky(inverse, upper=True)
    factors: Tensor = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
    return factors.float()
