"""The recipes of all quantized components of a bundle, found one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint
from exporters.components.component import Component
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from exporters.formats import FORMATS
from exporters.quality.emulate import Emulator
from exporters.quality.judge import PROMPTS, Judge, OutputJudge, PictureJudge
from exporters.quality.layers import Layers, Smoother
from exporters.quality.search import find_recipe, share_spared
from exporters.tokenizers import open_tokenizer
from fluxdeploy.bundle.recipe import NOTHING, Promise, Recipe, RecipeRecord
from fluxdeploy.precision import PRECISIONS, Quantization
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.schedule import sigmas

__all__ = ["Asked", "find_recipes", "layers_of"]

Array = NDArray[np.generic]

_ENCODED = 2
"""Prompts that text encoders and conditioner are judged over."""
_LEVELS, _TOKENS = 4, 1024


@dataclass(frozen=True)
class Asked:
    """A quantized component: its precision, and what all the rest of it computes in."""

    component: Component
    precision: str
    compute: str

    @property
    def quantization(self) -> Quantization:
        found = PRECISIONS[self.precision].quantization
        assert found is not None
        return found


def layers_of(
    asked: Asked, checkpoint: Checkpoint, recipe: Recipe, ranges: ActivationRanges | None
) -> Layers:
    """What becomes of a component's layers. Raises `ExportError` where a range is missing."""
    layers = Layers(asked.quantization, recipe, ranges)
    if not recipe.smoothed:
        return layers
    chain, weights = asked.component.source(checkpoint, "fp32")
    smoother = Smoother(chain, weights, layers.required())
    return replace(layers, smoothing=smoother.smooth(recipe.smoothed))


def find_recipes(
    checkpoint: Checkpoint,
    components: Sequence[Asked],
    ranges: Callable[[], ActivationRanges],
    promise: Promise | None,
    known: Mapping[str, RecipeRecord],
    progress: Progress,
) -> dict[str, RecipeRecord]:
    """The recipe of each component, by its name.

    `promise` is for the pictures, None for what the transformer's precision promises; one that asks
    for nothing has nothing judged. `ranges` gives what was measured, for components that need it.
    `known` are recipes of an earlier build: one of the same precision and promise is taken over.

    Raises `CheckpointError` for missing tensors, `NumericError` for values that are not finite, and
    what `ranges` raises.
    """
    finder = _Finder(checkpoint, ranges, known, progress)
    found: dict[str, RecipeRecord] = {}
    others: dict[str, tuple[Emulator, Layers]] = {}
    for asked in components:
        name, row = asked.component.name, PRECISIONS[asked.precision]
        if promise == Promise():
            found[name] = finder.unjudged(asked)
        elif name != "transformer":
            found[name], subject = finder.by_output(asked, Promise(cosine=row.min_cosine))
            others[name] = subject
        else:
            asks = promise or Promise(psnr=row.min_psnr, ssim=row.min_ssim)
            found[name] = finder.by_pictures(asked, asks, others)
    return found


class _Finder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: Callable[[], ActivationRanges],
        known: Mapping[str, RecipeRecord],
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._ranges = ranges
        self._known = known
        self._progress = progress

    def unjudged(self, asked: Asked) -> RecipeRecord:
        """Nothing is spared but what the format cannot have, and what an earlier build spared."""
        known = self._known.get(asked.component.name)
        if known is not None and known.precision == asked.precision:
            return known
        emulator = Emulator(asked.component, self._checkpoint, asked.compute)
        layers = self._start(asked, emulator, None)
        share = share_spared(emulator, layers)
        return RecipeRecord(asked.precision, Promise(), layers.recipe, None, None, share)

    def by_output(
        self, asked: Asked, promise: Promise
    ) -> tuple[RecipeRecord, tuple[Emulator, Layers]]:
        emulator = Emulator(asked.component, self._checkpoint, asked.compute)
        record = self._taken(asked, promise)
        if record is None:
            judge = OutputJudge(emulator, self._inputs(asked.component.name))
            record = self._find(asked, emulator, judge, promise, None)
        return record, (emulator, layers_of(asked, self._checkpoint, record.recipe, None))

    def by_pictures(
        self, asked: Asked, promise: Promise, others: Mapping[str, tuple[Emulator, Layers]]
    ) -> RecipeRecord:
        record = self._taken(asked, promise)
        if record is not None:
            return record
        emulator = Emulator(asked.component, self._checkpoint, asked.compute)
        needed = asked.quantization.activations is not None
        ranges = self._ranges() if needed else None
        judge = PictureJudge(self._checkpoint, emulator, others, self._progress)
        return self._find(asked, emulator, judge, promise, ranges)

    def _taken(self, asked: Asked, promise: Promise) -> RecipeRecord | None:
        known = self._known.get(asked.component.name)
        if known is None or (known.precision, known.promise) != (asked.precision, promise):
            return None
        return known

    def _find(
        self,
        asked: Asked,
        emulator: Emulator,
        judge: Judge,
        promise: Promise,
        ranges: ActivationRanges | None,
    ) -> RecipeRecord:
        smoother = None
        if ranges is not None and FORMATS[asked.quantization.format].smooths:
            smoother = Smoother(emulator.chain, emulator.weights, ranges)
        layers = self._start(asked, emulator, ranges)
        return find_recipe(
            emulator, asked.precision, layers, judge, promise, smoother, self._progress
        )

    def _start(self, asked: Asked, emulator: Emulator, ranges: ActivationRanges | None) -> Layers:
        layers = Layers(asked.quantization, Recipe(), ranges)
        shapes = {name: emulator.weights[f"{name}.weight"].shape for name in emulator.large}
        odd = [name for name, shape in shapes.items() if layers.format.problem(*shape)]
        return layers.sparing(dict.fromkeys(odd, NOTHING))

    def _inputs(self, name: str) -> list[dict[str, Array]]:
        """What a text encoder or the conditioner is given for a few prompts."""
        checkpoint, prompts = self._checkpoint, PROMPTS[:_ENCODED]
        length = checkpoint.defaults.max_sequence_length
        t5 = open_tokenizer(checkpoint.tokenizer("t5"), "t5", length)
        tokenizers = {"clip": open_tokenizer(checkpoint.tokenizer("clip"), "clip"), "t5": t5}
        ids = {
            encoder: [{"input_ids": row[None]} for row in tokenizer.encode(prompts)]
            for encoder, tokenizer in tokenizers.items()
        }
        if name in ids:
            return ids[name]
        rest: dict[str, Array] = {"timestep": sigmas(checkpoint.schedule, _LEVELS, _TOKENS)[:-1]}
        if checkpoint.transformer.guidance_embedding:
            rest["guidance"] = np.full(1, checkpoint.defaults.guidance_scale, np.float32)
        encoded = []
        for number in range(len(prompts)):
            outputs = dict(rest)
            for encoder, samples in ids.items():
                source = COMPONENTS[encoder].source(checkpoint, "fp32")
                outputs |= run_reference(*source, samples[number])
            encoded.append(outputs)
        return encoded
