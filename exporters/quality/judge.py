"""How near a component in few bits comes to float32: pictures decide, and a step's velocity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.calibrate.trajectory import (
    Calibration,
    Sample,
    default_calibration,
    start_samples,
    take_step,
)
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_samples
from exporters.quality.emulate import Emulator
from exporters.quality.layers import Layers
from fluxdeploy.bundle.recipe import Quality
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.latents import unpack, unscale
from fluxdeploy.similarity import psnr, ssim

__all__ = ["PROMPTS", "Judge", "OutputJudge", "PictureJudge"]

Array = NDArray[np.generic]
Floats = NDArray[np.float32]

PROMPTS = (
    "A wooden table with a bowl of green apples, a glass of water and a folded newspaper, morning",
    "two people in red coats walk along a frozen canal, seen from a bridge",
    "a blue triangle to the left of a yellow circle",
    'An old book cover, embossed gold letters "THE LIGHTHOUSE", dark leather, macro photograph',
)
"""Others than activations are measured over: what was measured fits those best."""

_SEED = 1001
_MOST = 150.0
"""dB that are told of pictures without any difference: JSON has no infinity."""
_FEW_STEPS, _MOST_STEPS = 4, 28
_LEAST_SIDE, _SIDE = 16, 256
"""Pixels: larger pictures take longer, and lose as much."""
_LARGE = 500_000_000
"""Weights of a transformer whose whole schedule takes hours on a CPU."""


class Judge(Protocol):
    """Says how near a component is to float32, where its layers are as told."""

    samples: Sequence[Mapping[str, Array]]
    """Inputs of the component, as float32 has them, to measure its layers over."""

    def judge(self, layers: Layers) -> Quality:
        """Raises `NumericError` where something is not finite."""


class OutputJudge:
    """Of a component by itself, over inputs that are given.

    Means of the emulator's inputs are measured over them.
    """

    def __init__(self, emulator: Emulator, samples: Sequence[Mapping[str, Array]]) -> None:
        self.samples = samples
        self._emulator = emulator
        with emulator.measuring():
            self._expected = emulator.run(samples, None)

    def judge(self, layers: Layers) -> Quality:
        found = self._emulator.run(self.samples, layers)
        return Quality(
            min(
                _cosine(output[name], exact[name])
                for output, exact in zip(found, self._expected, strict=True)
                for name in exact
            )
        )


class PictureJudge:
    """Of the transformer, by whole pictures: in a few steps, and over the schedule of a bundle.

    A recipe is judged once: the rest of the layers given has to stay the same. `others` are the
    quantized components that come before it, each with its layers. `sets` are
    what is drawn; the middle step of the first is what layers are measured over. Means of the
    emulator's inputs are measured as it is drawn in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        emulator: Emulator,
        others: Mapping[str, tuple[Emulator, Layers]],
        progress: Progress,
        sets: Sequence[Calibration] | None = None,
    ) -> None:
        self._checkpoint, self._emulator, self._progress = checkpoint, emulator, progress
        self._sets = sets or _sets(checkpoint)
        self._steps = sum(calibration.steps for calibration in self._sets)
        # The first half of a schedule decides what is in the picture.
        middle = self._sets[0].steps // 2
        exact = [start_samples(checkpoint, given, progress) for given in self._sets]
        plain = {name: Emulator(COMPONENTS[name], checkpoint, "fp32") for name in _TEXT}
        self._exact = exact
        self._plain = plain
        self.follow(others)
        task = progress.task("Drawing in float32", self._steps * len(emulator.chain.stages))
        self.samples: Sequence[Mapping[str, Array]] = []
        self._expected: list[Floats] = []
        chain, weights = emulator.chain, emulator.weights
        with emulator.measuring():
            for number, (given, samples) in enumerate(zip(self._sets, exact, strict=True)):
                samples = _copies(samples)
                for step in range(given.steps):
                    if number == 0 and step == middle:
                        self.samples = [sample.inputs(step) for sample in samples]
                    take_step(chain, weights, samples, step, emulator.enter, task.advance)
                self._expected += self._decode(given, samples)
        self._velocities = [o["velocity"] for o in emulator.run(self.samples, None)]

    def follow(self, others: Mapping[str, tuple[Emulator, Layers]]) -> None:
        """Have pictures begin with what these components give, from now on."""

        def encode(name: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
            emulator, layers = others.get(name, (self._plain[name], None))
            return emulator.run(samples, layers)

        self._judged: dict[str, Quality] = {}
        self._started = self._exact
        if others:
            quiet = Progress(quiet=True)
            self._started = [
                start_samples(self._checkpoint, given, quiet, encode) for given in self._sets
            ]

    def judge(self, layers: Layers) -> Quality:
        known = repr(layers.recipe)
        if known not in self._judged:
            self._judged[known] = self._draw(layers)
        return self._judged[known]

    def _draw(self, layers: Layers) -> Quality:
        chain, weights, enter = self._emulator.chain, self._emulator.weights, self._emulator.enter
        task = self._progress.task("Drawing in few bits", self._steps * len(chain.stages))
        pictures: list[Floats] = []
        for given, samples in zip(self._sets, self._started, strict=True):
            samples = _copies(samples)
            for step in range(given.steps):
                with self._emulator.running(layers):
                    take_step(chain, weights, samples, step, enter, task.advance)
            pictures += self._decode(given, samples)
        pairs = list(zip(pictures, self._expected, strict=True))
        ratios = [psnr(found, exact) for found, exact in pairs]
        found = self._emulator.run(self.samples, layers)
        worst = self._emulator.worst_layer(self.samples, layers)
        return Quality(
            statistics.median(
                _cosine(output["velocity"], exact)
                for output, exact in zip(found, self._velocities, strict=True)
            ),
            min(statistics.median(ratios), _MOST),
            statistics.median(ssim(found, exact) for found, exact in pairs),
            min(min(ratios), _MOST),
            worst if math.isfinite(worst) else None,
        )

    def _decode(self, given: Calibration, samples: Sequence[Sample]) -> list[Floats]:
        """The pictures of samples at their end, float32 [H, W, 3] in 0..1."""
        spec = self._checkpoint.latents
        sizes = [size for size in given.sizes for _ in given.prompts]
        latents = [
            {"latents": unscale(unpack(sample.latents, *size, spec), spec)}
            for sample, size in zip(samples, sizes, strict=True)
        ]
        source = COMPONENTS["vae_decoder"].source(self._checkpoint, "fp32")
        return [
            np.clip(output["images"][0].transpose(1, 2, 0) * 0.5 + 0.5, 0.0, 1.0)
            for output in run_samples(*source, latents)
        ]


_TEXT = ("clip", "t5", "conditioner")


def _sets(checkpoint: Checkpoint) -> list[Calibration]:
    """What is drawn: a few steps of several prompts and sizes, and whole schedules."""
    side, defaults = checkpoint.token_pixels, checkpoint.defaults
    # SSIM looks at 11 pixels a side.
    least = side * math.ceil(_LEAST_SIDE / side)
    height, width = (
        max(least, min(pixels, _SIDE) // side * side)
        for pixels in (defaults.height, defaults.width)
    )
    usual = replace(
        default_calibration(checkpoint),
        prompts=PROMPTS[:2],
        seed=_SEED,
        sizes=((height, width),),
        steps=_FEW_STEPS,
    )
    if _weight_count(checkpoint) > _LARGE:
        return [usual]
    half = max(least, width // 2 // side * side)
    whole = min(defaults.num_inference_steps, _MOST_STEPS)
    return [
        replace(
            usual,
            prompts=PROMPTS[:3],
            sizes=tuple(dict.fromkeys(((height, width), (height, half)))),
        ),
        replace(usual, prompts=PROMPTS[3:], steps=whole, seed=_SEED + 1),
    ]


def _weight_count(checkpoint: Checkpoint) -> int:
    weights = checkpoint.part("transformer").weights
    return sum(math.prod(stored.shape) for stored in weights.values())


def _copies(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample) for sample in samples]


def _cosine(found: Array, exact: Array) -> float:
    x, r = found.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(r))
    return float(x @ r) / norms if norms else float((x == r).all())
