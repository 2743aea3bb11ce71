"""The Fill demo: `demo:dev` learns to fill a hole so that the picture fits the prompt.

`python -m exporters.training.fill FOLDER` trains it, in under an hour on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from exporters.training.data import pack, to_tensor
from exporters.training.difference import widen
from exporters.training.loop import Recipe
from exporters.training.networks import TextEncoders, velocity
from exporters.training.pairs import Pair, PairBatch, PairSet
from exporters.training.task import TaskStage, train_task
from fluxdeploy.demo.holes import sample_hole
from fluxdeploy.demo.scenes import draw

__all__ = ["RECIPE", "FillStage", "fold_mask", "sample_fill"]

RECIPE = Recipe("fill", steps=1000, rate=2e-3, matrix_rate=2e-3, warmup=50, ema=0.99)

_PAIRS = 8192
_FACTOR = 8


class FillStage(TaskStage):
    """The whole picture given the one with the hole, which is drawn too outside of the hole.

    As in FLUX.1 Fill, channels are the latents, those of the masked picture, and the mask.
    """

    PIPELINE = "FluxFillPipeline"
    GUIDANCE = 1.0
    BATCH = 24

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextEncoders,
        pairs: PairSet,
        batch: int,
        device: torch.device,
    ) -> None:
        widen(transformer, transformer.config.in_channels + 4 * _FACTOR**2)
        super().__init__(transformer, text, pairs, batch, device)

    def velocity(
        self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], batch: PairBatch
    ) -> Tensor:
        """See `TaskStage`."""
        assert batch.masks is not None
        x = torch.cat([x, batch.given, fold_mask(batch.masks)], dim=-1)
        return velocity(self._transformer, x, t, text, batch.size, self._guidance())


def sample_fill(rng: np.random.Generator, height: int, width: int) -> Pair:
    """A picture, and the same with a hole of gray, which is 0."""
    hole = sample_hole(rng, height, width)
    picture = to_tensor(draw(hole.drawing)[None])[0]
    mask = torch.from_numpy(hole.mask.astype(np.float32))
    return Pair(hole.prompt, picture, picture * (1 - mask), mask)


def fold_mask(masks: Tensor) -> Tensor:
    """Masks [B, H, W] as the transformer takes them: [B, L, 256], each latent cell's 8x8 pixels."""
    b, height, width = masks.shape
    h, w = height // _FACTOR, width // _FACTOR
    cells = masks.reshape(b, h, _FACTOR, w, _FACTOR).permute(0, 2, 4, 1, 3)
    return pack(cells.reshape(b, _FACTOR**2, h, w))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, seed: int, device: str) -> None:
    """Train the Fill demo and write FOLDER/fill, with a record of the training."""
    train_task(RECIPE, FillStage, sample_fill, _PAIRS, folder, seed, torch.device(device))


if __name__ == "__main__":
    main()
