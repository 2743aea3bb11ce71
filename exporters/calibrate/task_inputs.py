"""What a task puts around the latents, for pictures that nobody has given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from fluxdeploy.sampling.examples import example_edges, example_mask, example_picture
from fluxdeploy.sampling.latents import pack, scale, token_grid
from fluxdeploy.sampling.masks import hide, mask_channels
from fluxdeploy.sampling.rope import picture_ids

__all__ = ["TaskInputs", "task_inputs"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TaskInputs:
    """Channels beside the latents, float32 [1, L, C'], and tokens behind them, [1, R, C].

    `ids` are those of the tokens, [R, axes] each.
    """

    channels: tuple[Floats, ...] = ()
    tokens: tuple[Floats, ...] = ()
    ids: tuple[NDArray[np.float64], ...] = ()

    def around(self, latents: Floats) -> Floats:
        """What the transformer reads, for latents [1, L, C]."""
        beside = np.concatenate([latents, *self.channels], axis=2)
        return np.concatenate([beside, *self.tokens], axis=1)


def task_inputs(checkpoint: Checkpoint, height: int, width: int) -> TaskInputs:
    """What stands around the latents of a picture, for what a checkpoint was trained for."""
    spec, task = checkpoint.latents, checkpoint.task
    if task == "text to image":
        return TaskInputs()
    picture = example_edges if task == "control" else example_picture
    image = np.float32(2) * picture(height, width).transpose(2, 0, 1)[None] - np.float32(1)
    marked = example_mask(height, width)[None]
    if task == "fill":
        image = hide(image, marked)
    source = COMPONENTS["vae_encoder"].source(checkpoint, "fp32")
    mean = run_reference(*source, {"images": image})["mean"]
    known = pack(scale(mean.astype(np.float32), spec), spec)
    if task == "fill":
        return TaskInputs(channels=(known, mask_channels(marked, spec)))
    if task == "control":
        return TaskInputs(channels=(known,))
    grid = token_grid(height, width, spec)
    return TaskInputs(tokens=(known,), ids=(picture_ids(*grid, len(checkpoint.rope.axes_dims), 1),))
