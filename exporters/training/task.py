"""How the demo of a task is trained over `demo:dev`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.checkpoint import read_checkpoint
from exporters.training.difference import Difference
from exporters.training.loop import Draw, Recipe, plot_losses, train, write_record
from exporters.training.networks import TextEncoders
from exporters.training.pairs import Pair, PairSet, make_pairs
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.progress import Progress

__all__ = ["TaskStage", "train_task"]

_BATCH = 24


class TaskStage(Protocol):
    """A stage that trains a difference of a transformer."""

    difference: Difference
    networks: nn.ModuleDict

    def loss(self, draw_: Draw) -> dict[str, Tensor]:
        """Named terms, of which the sum is minimised."""


def train_task(
    recipe: Recipe,
    stage_of: Callable[
        [FluxTransformer2DModel, TextEncoders, PairSet, int, torch.device], TaskStage
    ],
    sample: Callable[[np.random.Generator, int, int], Pair],
    pairs: int,
    folder: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Train a task's difference and write `folder/NAME.safetensors`, with a record of the training.

    A run that was stopped goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    transformer, text, vae = read_checkpoint(DEMO_CHECKPOINTS["demo:dev"])
    with Progress() as progress:
        kept = folder / "pairs.pt"
        made = make_pairs(sample, pairs, vae.to(device), kept, seed, device, progress)
        stage = stage_of(transformer, text, made, _BATCH, device)
        train(recipe, stage.networks, stage.loss, folder, seed, device, progress)
    stage.difference.write(folder / f"{recipe.name}.safetensors")
    plot_losses(folder, [recipe.name])
    write_record(folder, [recipe.name], device)
