"""Rotary position embedding: the ids of the joint sequence and their cosine and sine tables.

Every token has an id whose last two numbers are its row and column; FLUX.1's ids are (t, row,
column). Each axis of the id turns its own share of a head's channels, `axes_dims`, with frequencies
theta^(-2i/dim) as in RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import RopeSpec
from fluxdeploy.errors import BundleError

__all__ = ["joint_ids", "picture_ids", "rope_tables"]


def joint_ids(text_tokens: int, rows: int, columns: int, axes: int) -> NDArray[np.float64]:
    """Ids [S + L, axes] of the joint sequence: zeros for text, then (..., row, column) row by row.

    Raises `BundleError` for fewer than the two axes that a picture has.
    """
    if axes < 2:
        raise BundleError(
            f"The manifest gives RoPE {axes} axes. Rows and columns take two; rebuild the bundle."
        )
    text = np.zeros((text_tokens, axes), np.float64)
    return np.concatenate([text, picture_ids(rows, columns, axes)])


def picture_ids(rows: int, columns: int, axes: int, number: int = 0) -> NDArray[np.float64]:
    """Ids [L, axes] of a picture's tokens: (number, ..., row, column), row by row.

    number: 0 of the picture that is drawn, from 1 on of those that it is drawn after, as in the
    report on FLUX.1 Kontext (arXiv 2506.15742). There are two axes at least, and three where the
    number is not 0.
    """
    ids = np.zeros((rows * columns, axes), np.float64)
    if number:
        ids[:, 0] = number
    ids[:, -2] = np.repeat(np.arange(rows), columns)
    ids[:, -1] = np.tile(np.arange(columns), rows)
    return ids


def rope_tables(
    ids: NDArray[np.float64], spec: RopeSpec
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables, float32 [T, head_dim], of ids [T, axes].

    Channels 2i and 2i+1 are a pair that turns together, so each angle stands twice. Angles are
    computed in float64. Raises `BundleError` where the axes do not fit the ids.
    """
    if len(spec.axes_dims) != ids.shape[1]:
        raise BundleError(
            f"The manifest splits a head into RoPE axes of {list(spec.axes_dims)} channels. There "
            f"must be {ids.shape[1]}, one for each number of an id; rebuild the bundle."
        )
    angles = np.concatenate(
        [
            np.outer(ids[:, axis], _frequencies(dim, spec.theta))
            for axis, dim in enumerate(spec.axes_dims)
        ],
        axis=1,
    )
    cos = np.repeat(np.cos(angles).astype(np.float32), 2, axis=1)
    sin = np.repeat(np.sin(angles).astype(np.float32), 2, axis=1)
    return cos, sin


def _frequencies(dim: int, theta: float) -> NDArray[np.float64]:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
