"""The flow stage: rectified flow on latents, text encoders and transformer together."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training.data import SIZES, draw_batch, draw_size, labels, pack
from exporters.training.loop import Draw, Recipe, save
from exporters.training.networks import TextEncoders, velocity
from exporters.training.reader import Reader
from exporters.training.text import CaptionReader, drop_captions, facts
from exporters.training.vae import encode
from fluxdeploy.demo.scenes import Scene, caption
from fluxdeploy.progress import Progress

__all__ = ["RECIPE", "Batch", "FlowStage", "LatentSet", "make_latents", "noised"]

RECIPE = Recipe("flow", steps=5200, rate=1e-3, matrix_rate=2e-3)

_SCENES = 36864
_READ_AFTER = 2  # of five single blocks
_READING = 0.1
_FACTS = 0.1

Size = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Latents [B, L, 64] and labels [B, L, 6] of one picture size, B captions and their facts."""

    size: Size
    latents: Tensor
    labels: Tensor
    captions: list[str]
    facts: Tensor


@dataclass(frozen=True)
class LatentSet:
    """The training set by picture size.

    Latents, packed and scaled: [N, L, 64]; what is where: uint8 [N, L, 6], see `labels`; and the N
    scenes.
    """

    latents: dict[Size, Tensor]
    labels: dict[Size, Tensor]
    scenes: dict[Size, list[Scene]]

    def batch(self, draw: Draw, count: int, device: torch.device) -> Batch:
        """A batch of one size, with freshly worded captions."""
        size = draw_size(draw.scenes)
        chosen = draw.scenes.integers(len(self.scenes[size]), size=count)
        scenes = [self.scenes[size][index] for index in chosen]
        captions = [caption(scene, draw.scenes) for scene in scenes]
        said = torch.from_numpy(np.stack([facts(scene) for scene in scenes]))
        rows = torch.from_numpy(chosen)
        latents = self.latents[size][rows].float().to(device)
        return Batch(size, latents, self.labels[size][rows].to(device), captions, said)


def make_latents(
    vae: AutoencoderKL, folder: Path, seed: int, device: torch.device, progress: Progress
) -> tuple[LatentSet, float, float]:
    """Draw and encode the training set; also its latents' standard deviation and mean.

    The latents are kept in `folder`; the scenes are drawn again from the seed.
    """
    file = folder / "latents.pt"
    latents: dict[Size, Tensor] = torch.load(file, weights_only=True) if file.exists() else {}
    marks: dict[Size, Tensor] = {}
    scenes: dict[Size, list[Scene]] = {}
    counts = {size: _SCENES * weight // sum(SIZES.values()) for size, weight in SIZES.items()}
    task = progress.task("Drawing and encoding scenes", total=sum(counts.values()))
    fresh = not latents
    start = time.monotonic()
    for index, (size, count) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, index])
        encoded, places, scenes[size] = [], [], []
        for first in range(0, count, 64):
            pictures, drawn, drawings = draw_batch(rng, min(64, count - first), size)
            scenes[size] += drawn
            places += [labels(drawing) for drawing in drawings]
            if fresh:
                encoded.append(pack(encode(vae, pictures, device)).half().cpu())
            task.advance(len(drawn))
        marks[size] = torch.from_numpy(np.stack(places))
        if fresh:
            latents[size] = torch.cat(encoded)
    if fresh:
        save(latents, file)
        seconds = round(time.monotonic() - start, 1)
        line = json.dumps({"step": sum(counts.values()), "seconds": seconds})
        (folder / "latents.jsonl").write_text(line + "\n")
    values = torch.cat([tensor.flatten() for tensor in latents.values()]).float()
    deviation, mean = float(values.std()), float(values.mean())
    scaled = {size: (tensor - mean) / deviation for size, tensor in latents.items()}
    return LatentSet(scaled, marks, scenes), deviation, mean


class FlowStage:
    """Rectified flow (X. Liu and others, 2022): x_t = (1 - t) x_0 + t x_1, target x_1 - x_0.

    The noise level t is logit-normal (P. Esser and others, 2024). A share of the captions is
    dropped, so that the empty prompt is an unconditional model.

    The middle of the transformer also has to tell what lies where, which `reader` reads from it
    (after S. Yu and others, "Representation Alignment for Generation", 2024, with the scenes' own
    labels in the place of another network's features). Its loss shows how well the model sees. The
    text encoders go on learning, and `captions` sees that they forget nothing.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextEncoders,
        captions: CaptionReader,
        data: LatentSet,
        batch: int,
        device: torch.device,
    ) -> None:
        self.reader = Reader(transformer.inner_dim).to(device)
        self.networks = nn.ModuleDict(
            {
                "transformer": transformer,
                "text": text,
                "captions": captions,
                "reader": self.reader,
            }
        )
        self._captions = captions
        self._transformer, self._text, self._data = transformer, text, data
        self._batch, self._device = batch, device
        self._middle = torch.empty(0)
        transformer.single_transformer_blocks[_READ_AFTER].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        self._middle = outputs[1]

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        batch = self._data.batch(draw, self._batch, self._device)
        prompts, said = drop_captions(batch.captions, batch.facts, draw)
        t, noise, x = noised(batch.latents, draw)
        text = self._text(prompts)
        predicted = velocity(self._transformer, x, t, text, batch.size)
        return {
            "flow": (predicted - (noise - batch.latents)).square().mean(),
            "reading": _READING * self.reader.loss(self._middle, batch.labels),
            "facts": _FACTS * self._captions.loss(text, said.to(self._device)),
        }


def noised(latents: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Noise levels [B], the noise, and the latents with it."""
    # A thing covers many numbers of the latents, so that where it lies is decided at noise levels
    # of 0.75 to 0.97, and its outline at 0.3 to 0.7: the mean lies between the two.
    t = torch.sigmoid(1.2 * draw.normal(len(latents)) + 1.2).to(latents.device)
    noise = draw.normal(*latents.shape).to(latents.device)
    share = t[:, None, None]
    return t, noise, (1 - share) * latents + share * noise
