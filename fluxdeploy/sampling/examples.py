"""A picture and a mask to try a task with, where nobody has given one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["example_edges", "example_mask", "example_picture"]


def example_picture(height: int, width: int) -> NDArray[np.float32]:
    """A disc and a bar on a slope of colours, float32 [H, W, 3] in 0..1."""
    rows, columns = _grid(height, width)
    picture = np.stack([0.3 + 0.6 * rows, 0.9 - 0.5 * columns, 0.5 + 0.3 * rows * columns], axis=-1)
    picture[(rows - 0.4) ** 2 + (columns - 0.35) ** 2 < 0.05] = (0.85, 0.15, 0.1)
    picture[(abs(rows - 0.7) < 0.06) & (abs(columns - 0.6) < 0.3)] = (0.1, 0.2, 0.6)
    return picture.astype(np.float32)


def example_mask(height: int, width: int) -> NDArray[np.bool_]:
    """A box over the middle, [H, W]."""
    rows, columns = _grid(height, width)
    return np.asarray((abs(rows - 0.45) < 0.25) & (abs(columns - 0.5) < 0.3))


def example_edges(height: int, width: int) -> NDArray[np.float32]:
    """How steeply `example_picture` changes from pixel to pixel, as grey [H, W, 3] in 0..1."""
    grey = example_picture(height, width).mean(axis=2)
    steps = [np.diff(grey, axis=axis, append=np.take(grey, [-1], axis=axis)) for axis in (0, 1)]
    steep = np.clip(8 * np.hypot(*steps), 0, 1)
    return np.repeat(steep[..., None], 3, axis=2).astype(np.float32)


def _grid(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far down and how far right each pixel is, 0 to 1."""
    rows, columns = np.mgrid[0:height, 0:width]
    return (rows + 0.5) / height, (columns + 0.5) / width
