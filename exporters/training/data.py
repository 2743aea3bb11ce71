"""Batches of scenes for training: pictures and the scenes that they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxdeploy.demo.scenes import (
    COLOURS,
    SHAPES,
    Drawing,
    Scene,
    arrange,
    coverage,
    draw,
    sample_scene,
)

__all__ = ["SIZES", "draw_batch", "draw_size", "draw_windows", "labels", "pack", "to_tensor"]

Array = np.ndarray[Any, np.dtype[Any]]

SIZES = {
    (128, 128): 8,
    (96, 96): 2,
    (96, 128): 2,
    (128, 96): 2,
    (96, 160): 2,
    (160, 96): 2,
    (128, 160): 1,
    (160, 128): 1,
    (160, 160): 1,
}
"""Heights and widths in pixels, and how often each comes."""

_WINDOW = 64


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """A random height and width."""
    sizes, weights = list(SIZES), np.array(list(SIZES.values()), np.float64)
    return sizes[int(rng.choice(len(sizes), p=weights / weights.sum()))]


def draw_batch(
    rng: np.random.Generator, count: int, size: tuple[int, int] | None = None
) -> tuple[Array, list[Scene], list[Drawing]]:
    """Pictures uint8 [count, H, W, 3] of one size, with their scenes, none of them held out."""
    height, width = size or draw_size(rng)
    scenes = [sample_scene(rng) for _ in range(count)]
    drawings = [arrange(scene, height, width, rng) for scene in scenes]
    return np.stack([draw(drawing) for drawing in drawings]), scenes, drawings


def draw_windows(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Windows uint8 [2 count, 64, 64, 3], each around one thing of a scene, with their labels."""
    height, width = draw_size(rng)
    windows, marks = [], []
    for _ in range(2 * count):
        drawing = arrange(sample_scene(rng), height, width, rng)
        thing = drawing.things[int(rng.integers(len(drawing.things)))]
        corner = np.array([thing.y, thing.x]) - _WINDOW / 2 + rng.uniform(-20, 20, 2)
        # Whole tokens, so that the labels are those of the scene.
        y, x = 16 * (np.clip(corner, 0, (height - _WINDOW, width - _WINDOW)) // 16).astype(int)
        windows.append(draw(drawing)[y : y + _WINDOW, x : x + _WINDOW])
        grid = labels(drawing).reshape(height // 16, width // 16, -1)
        cut = grid[y // 16 : (y + _WINDOW) // 16, x // 16 : (x + _WINDOW) // 16]
        marks.append(cut.reshape(-1, grid.shape[-1]))
    return np.stack(windows), np.stack(marks)


def labels(drawing: Drawing) -> Array:
    """What lies in each token's 16x16 pixels: uint8 [L, 6].

    The shape and the colour of the thing there, counted from 1, 0 for none; and the share of each
    quarter that things cover, out of 255.
    """
    height, width = drawing.height, drawing.width
    found = np.zeros((height // 16, width // 16, 6), np.uint8)
    for placed in drawing.things:
        shape = placed.thing.shape
        covered = coverage(shape, height, width, placed.x, placed.y, placed.radius)
        quarters = covered.reshape(height // 16, 2, 8, width // 16, 2, 8).mean((2, 5))
        quarters = quarters.transpose(0, 2, 1, 3).reshape(height // 16, width // 16, 4)
        here = quarters.mean(-1) > 0.02
        found[here, 0] = 1 + SHAPES.index(shape)
        found[here, 1] = 1 + list(COLOURS).index(placed.thing.colour)
        found[..., 2:] = np.maximum(found[..., 2:], np.rint(255 * quarters))
    return found.reshape(-1, 6)


def to_tensor(pictures: Array) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def pack(latents: Tensor) -> Tensor:
    """[B, 16, H/8, W/8] to [B, H/16 * W/16, 64], as the transformer takes them."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)
