"""How the demo of a task is trained over `demo:dev`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.checkpoint import read_checkpoint
from exporters.training.difference import Difference
from exporters.training.flow import noised
from exporters.training.loop import Draw, Recipe, plot_losses, train, write_record
from exporters.training.networks import TextEncoders
from exporters.training.pairs import Pair, PairBatch, PairSet, make_pairs
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.progress import Progress

__all__ = ["TaskStage", "train_task"]


class TaskStage(ABC):
    """Rectified flow, at guidance 1, of a picture given the prompt and another picture.

    At guidance 1 a guided model is the plain one, whose loss this is; what is learnt there serves
    at every guidance. The text encoders stay as they are.
    """

    PIPELINE: ClassVar[str]
    """The name of diffusers' pipeline."""

    GUIDANCE: ClassVar[float]
    """The checkpoint's own default for a picture."""

    BATCH: ClassVar[int]

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextEncoders,
        pairs: PairSet,
        batch: int,
        device: torch.device,
    ) -> None:
        self.difference = Difference(transformer).to(device)
        self.networks = nn.ModuleDict({"difference": self.difference})
        self._transformer = transformer.to(device)
        self._text, self._pairs = text.to(device), pairs
        self._batch, self._device = batch, device

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        """Named terms, of which the sum is minimised."""
        batch = self._pairs.batch(draw, self._batch, self._device)
        with torch.no_grad():
            text = self._text(batch.prompts)
        t, noise, x = noised(batch.wanted, draw)
        predicted = self.velocity(x, t, text, batch)
        return self.terms(predicted, noise - batch.wanted, batch)

    def terms(self, predicted: Tensor, wanted: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """The loss of a velocity [B, L, 64]: its squared error."""
        return {"flow": (predicted - wanted).square().mean()}

    @abstractmethod
    def velocity(
        self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], batch: PairBatch
    ) -> Tensor:
        """The velocity [B, L, 64] at noise levels `t` [B] of `x` [B, L, 64], given the pictures."""

    def _guidance(self) -> Tensor:
        return torch.ones(self._batch, device=self._device)


def train_task(
    recipe: Recipe,
    stage_of: type[TaskStage],
    sample: Callable[[np.random.Generator, int, int], Pair],
    pairs: int,
    folder: Path,
    seed: int,
    device: torch.device,
) -> None:
    """Train a task's difference and write `folder/NAME`, with a record of the training.

    That is what `fluxdeploy.demo.assemble` makes a checkpoint of. A run that was stopped goes on
    where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    transformer, text, vae = read_checkpoint(DEMO_CHECKPOINTS["demo:dev"])
    with Progress() as progress:
        kept = folder / "pairs.pt"
        made = make_pairs(sample, pairs, vae.to(device), kept, seed, device, progress)
        stage = stage_of(transformer, text, made, stage_of.BATCH, device)
        train(recipe, stage.networks, stage.loss, folder, seed, device, progress)
    _write(folder / recipe.name, transformer, stage)
    plot_losses(folder, [recipe.name])
    write_record(folder, [recipe.name], device)


def _write(folder: Path, transformer: FluxTransformer2DModel, stage: TaskStage) -> None:
    index = json.loads((DEMO_CHECKPOINTS["demo:dev"] / "model_index.json").read_text())
    index["_class_name"] = stage.PIPELINE
    index["_fluxdeploy"]["guidance_scale"] = stage.GUIDANCE
    config = json.loads(transformer.to_json_string())
    config.pop("_name_or_path", None)
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    stage.difference.write(folder / "difference.safetensors")
