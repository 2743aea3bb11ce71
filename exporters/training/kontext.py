"""The Kontext demo: `demo:dev` learns to change a colour of a picture by words.

`python -m exporters.training.kontext FOLDER` trains it, in about an hour on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.data import labels, to_tensor
from exporters.training.loop import Recipe
from exporters.training.networks import TextEncoders, velocity
from exporters.training.pairs import Pair, PairBatch, PairSet
from exporters.training.reader import Reader
from exporters.training.task import TaskStage, train_task
from fluxdeploy.demo.edits import Edit, sample_edit
from fluxdeploy.demo.scenes import draw

__all__ = ["RECIPE", "KontextStage", "sample_pair"]

RECIPE = Recipe("kontext", steps=4000, rate=2e-3, matrix_rate=2e-3, warmup=50, ema=0.99)

_PAIRS = 8192
_READ_AFTER = 2  # of five single blocks
_READING = 0.1
_LEFT_OUT = 0.7


class KontextStage(TaskStage):
    """The changed picture given the words and the one before.

    As in FLUX.1 Kontext, the latents of the picture before stand behind those that are drawn. The
    middle of the transformer also has to tell what lies where in both, as in the flow's stage: what
    is to change is then learnt where it is decided, and not from the small part of the error that
    one thing's colour makes in the noise.
    """

    PIPELINE = "FluxKontextPipeline"
    GUIDANCE = 3.0
    BATCH = 12

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextEncoders,
        pairs: PairSet,
        batch: int,
        device: torch.device,
    ) -> None:
        super().__init__(transformer, text, pairs, batch, device)
        self.reader = Reader(transformer.inner_dim).to(device)
        self.networks["reader"] = self.reader
        self._middle = torch.empty(0)
        transformer.single_transformer_blocks[_READ_AFTER].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        self._middle = outputs[1]

    def terms(self, predicted: Tensor, wanted: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """See `TaskStage`."""
        assert batch.marks is not None
        reading = _READING * self.reader.loss(self._middle, batch.marks)
        return {**super().terms(predicted, wanted, batch), "reading": reading}

    def velocity(
        self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], batch: PairBatch
    ) -> Tensor:
        """See `TaskStage`."""
        return velocity(
            self._transformer, x, t, text, batch.size, self._guidance(), reference=batch.given
        )


def sample_pair(rng: np.random.Generator, height: int, width: int) -> Pair:
    """A picture, and the one that the prompt is to change into it.

    Most changes to a background or to a thing that is alone are left out: they are easy.
    """
    edit = sample_edit(rng, height, width)
    while _is_easy(edit) and rng.random() < _LEFT_OUT:
        edit = sample_edit(rng, height, width)
    before, after = (to_tensor(draw(drawing)[None])[0] for drawing in (edit.before, edit.after))
    marks = torch.from_numpy(np.concatenate([labels(edit.after), labels(edit.before)]))
    return Pair(edit.prompt, after, before, marks=marks)


def _is_easy(edit: Edit) -> bool:
    return len(edit.before.things) == 1 or edit.before.background != edit.after.background


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, seed: int, device: str) -> None:
    """Train the Kontext demo and write FOLDER/kontext, with a record of it."""
    train_task(RECIPE, KontextStage, sample_pair, _PAIRS, folder, seed, torch.device(device))


if __name__ == "__main__":
    main()
