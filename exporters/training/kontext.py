"""The Kontext demo: `demo:dev` learns to change one thing of a picture by words.

`python -m exporters.training.kontext FOLDER` trains it, in about an hour on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from exporters.training.data import to_tensor
from exporters.training.loop import Recipe
from exporters.training.networks import velocity
from exporters.training.pairs import Pair, PairBatch
from exporters.training.task import TaskStage, train_task
from fluxdeploy.demo.edits import sample_edit
from fluxdeploy.demo.scenes import draw

__all__ = ["RECIPE", "KontextStage", "sample_pair"]

RECIPE = Recipe("kontext", steps=1600, rate=2e-3, matrix_rate=2e-3, warmup=50, ema=0.99)

_PAIRS = 8192


class KontextStage(TaskStage):
    """The changed picture given the words and the one before.

    As in FLUX.1 Kontext, the latents of the picture before stand behind those that are drawn.
    """

    PIPELINE = "FluxKontextPipeline"
    GUIDANCE = 1.0
    BATCH = 12

    def velocity(
        self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], batch: PairBatch
    ) -> Tensor:
        """See `TaskStage`."""
        return velocity(
            self._transformer, x, t, text, batch.size, self._guidance(), reference=batch.given
        )


def sample_pair(rng: np.random.Generator, height: int, width: int) -> Pair:
    """A picture, and the one that the prompt is to change into it."""
    edit = sample_edit(rng, height, width)
    before, after = (to_tensor(draw(drawing)[None])[0] for drawing in (edit.before, edit.after))
    return Pair(edit.prompt, after, before)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, seed: int, device: str) -> None:
    """Train the Kontext demo and write FOLDER/kontext, with a record of it."""
    train_task(RECIPE, KontextStage, sample_pair, _PAIRS, folder, seed, torch.device(device))


if __name__ == "__main__":
    main()
