"""The recipes of all quantized components of a bundle, found one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from exporters.calibrate.means import (
    Means,
    Moments,
    encode_bytes,
    encode_mean,
    spread_means,
    spread_moments,
)
from exporters.calibrate.ranges import ActivationRanges
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Chain
from exporters.components.component import Component
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from exporters.formats import FORMATS
from exporters.quality.emulate import Emulator
from exporters.quality.judge import PROMPTS, Judge, OutputJudge, PictureJudge
from exporters.quality.layers import Layers, Smoother
from exporters.quality.search import MARGIN, cost_of, find_recipe
from exporters.tokenizers import open_tokenizer
from fluxdeploy.bundle.recipe import NOTHING, Promise, Recipe, RecipeRecord
from fluxdeploy.precision import PRECISIONS, Quantization
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.schedule import sigmas

__all__ = ["Asked", "Found", "find_recipes", "layers_of"]

Array = NDArray[np.generic]

_ENCODED = 2
"""Prompts that text encoders and conditioner are judged over."""
_LEVELS, _TOKENS = 4, 1024

_ROOM = 3.0
"""dB that pictures without the transformer's own noise have to be better than was promised."""
_TRIES = 3
_NEAREST = 1 - 1e-7
"""The largest cosine that is asked for: float32 rounds what is nearer."""


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


@dataclass(frozen=True)
class Found:
    """What was found for the components of a bundle, by their names."""

    recipes: Mapping[str, RecipeRecord] = field(default_factory=dict)
    means: Mapping[str, Means] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)


def layers_of(
    asked: Asked,
    checkpoint: Checkpoint,
    recipe: Recipe,
    ranges: ActivationRanges | None,
    means: Means,
    moments: Moments,
) -> Layers:
    """What becomes of a component's layers.

    Raises `ExportError` where a range is missing.
    """
    layers = Layers(asked.quantization, recipe, ranges)
    if not recipe.smoothed and not means:
        return layers
    chain, weights = asked.component.source(checkpoint, "fp32")
    layers = _informed(layers, chain, means, moments)
    if not recipe.smoothed:
        return layers
    smoother = Smoother(chain, weights, layers.required())
    return replace(layers, smoothing=smoother.smooth(recipe.smoothed))


def _informed(layers: Layers, chain: Chain, means: Means, moments: Moments) -> Layers:
    known = spread_moments(chain, moments) if layers.format.takes_moments else {}
    return replace(layers, means=spread_means(chain, means), moments=known)


def find_recipes(
    checkpoint: Checkpoint,
    components: Sequence[Asked],
    ranges: Callable[[], ActivationRanges],
    promise: Promise | None,
    known: Found,
    progress: Progress,
) -> Found:
    """The recipe of each component, and the means of what its linears read where it was judged.

    `promise` is for the pictures, None for what the transformer's precision promises; one that asks
    for nothing has nothing judged. `ranges` gives what was measured, for components that need it.
    `known` is of an earlier build: a recipe of the same precision and promise is taken over, with
    the means and moments that it was judged with.

    Raises `CheckpointError` for missing tensors, `NumericError` for values that are not finite, and
    what `ranges` raises.
    """
    finder = _Finder(checkpoint, ranges, known, progress)
    found: dict[str, RecipeRecord] = {}
    others: dict[str, tuple[Asked, Emulator, Layers]] = {}
    for asked in components:
        name, row = asked.component.name, PRECISIONS[asked.precision]
        if promise == Promise():
            found[name] = finder.unjudged(asked)
        elif name != "transformer":
            found[name], subject = finder.by_output(asked, Promise(cosine=row.min_cosine))
            others[name] = (asked, *subject)
        else:
            asks = promise or Promise(psnr=row.min_psnr, ssim=row.min_ssim)
            found |= finder.by_pictures(asked, asks, others, found)
    return Found(found, finder.means, finder.moments)


class _Finder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: Callable[[], ActivationRanges],
        known: Found,
        progress: Progress,
    ) -> None:
        self.means: dict[str, Means] = dict(known.means)
        self.moments: dict[str, Moments] = dict(known.moments)
        self._checkpoint = checkpoint
        self._ranges = ranges
        self._known = known.recipes
        self._progress = progress
        self._judges: dict[str, OutputJudge] = {}

    def unjudged(self, asked: Asked) -> RecipeRecord:
        """Nothing is spared but what the format cannot have, and what an earlier build spared."""
        known = self._known.get(asked.component.name)
        if known is not None and known.precision == asked.precision:
            return known
        emulator = self._emulator(asked)
        layers = self._start(asked, emulator, None)
        cost = cost_of(emulator, layers)
        return RecipeRecord(asked.precision, Promise(), layers.recipe, None, None, *cost)

    def by_output(
        self, asked: Asked, promise: Promise
    ) -> tuple[RecipeRecord, tuple[Emulator, Layers]]:
        emulator = self._emulator(asked)
        record = self._taken(asked, promise)
        if record is None:
            judge = self._output_judge(asked, emulator)
            self._learn(asked, emulator)
            record = self._find(asked, emulator, judge, promise, None)
        return record, (emulator, self._layers(asked, record.recipe))

    def by_pictures(
        self,
        asked: Asked,
        promise: Promise,
        others: Mapping[str, tuple[Asked, Emulator, Layers]],
        found: Mapping[str, RecipeRecord],
    ) -> dict[str, RecipeRecord]:
        """The transformer's recipe, and those of `others` where they had to change for it.

        `found` are the recipes that these have.
        """
        name = asked.component.name
        record = self._taken(asked, promise)
        if record is not None:
            return {name: record, **self._taken_beside(found)}
        emulator = self._emulator(asked)
        ranges = self._ranges() if PRECISIONS[asked.precision].calibrated else None
        subjects = {n: (emulator, layers) for n, (_, emulator, layers) in others.items()}
        judge = PictureJudge(self._checkpoint, emulator, subjects, self._progress)
        self._learn(asked, emulator)
        changed = self._tighten(asked, emulator, judge, promise, others, found, ranges)
        return {**changed, name: self._find(asked, emulator, judge, promise, ranges)}

    def _taken_beside(self, found: Mapping[str, RecipeRecord]) -> dict[str, RecipeRecord]:
        """What an earlier build has found for the transformer's sake too."""
        return {
            name: known
            for name, known in self._known.items()
            if name in found and known.precision == found[name].precision
        }

    def _tighten(
        self,
        asked: Asked,
        emulator: Emulator,
        judge: PictureJudge,
        promise: Promise,
        others: Mapping[str, tuple[Asked, Emulator, Layers]],
        found: Mapping[str, RecipeRecord],
        ranges: ActivationRanges | None,
    ) -> dict[str, RecipeRecord]:
        """Spare layers of what comes before the transformer, where these alone cost too much."""
        layers = self._start(asked, emulator, ranges)
        if not others or promise.missing(judge.judge(layers)) + MARGIN <= 0:
            return {}
        nothing = layers.sparing(dict.fromkeys((*emulator.large, *emulator.attentions), NOTHING))
        changed = dict(found)
        for _ in range(_TRIES):
            missing = promise.missing(judge.judge(nothing)) + MARGIN + _ROOM
            if missing <= 0:
                break
            subjects = {}
            for name, (other, subject, _) in others.items():
                quality = changed[name].after
                assert quality is not None
                cosine = 1 - (1 - quality.cosine) * 10 ** (-missing / 10)
                asks = Promise(cosine=min(cosine, _NEAREST))
                outputs = self._output_judge(other, subject)
                changed[name] = self._find(other, subject, outputs, asks, None)
                recipe = changed[name].recipe
                subjects[name] = subject, self._layers(other, recipe)
            judge.follow(subjects)
        return changed

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
        def smoother() -> Smoother | None:
            quantization = asked.quantization
            if quantization.activations is None or not FORMATS[quantization.format].smooths:
                return None
            return Smoother(emulator.chain, emulator.weights, self._ranges())

        layers = self._start(asked, emulator, ranges)
        return find_recipe(
            emulator, asked.precision, layers, judge, promise, smoother, self._progress
        )

    def _emulator(self, asked: Asked) -> Emulator:
        moments = FORMATS[asked.quantization.format].takes_moments
        return Emulator(asked.component, self._checkpoint, asked.compute, moments)

    def _start(self, asked: Asked, emulator: Emulator, ranges: ActivationRanges | None) -> Layers:
        layers = Layers(asked.quantization, Recipe(), ranges)
        layers = _informed(layers, emulator.chain, *self._known_of(asked))
        shapes = {name: emulator.weights[f"{name}.weight"].shape for name in emulator.large}
        odd = [name for name, shape in shapes.items() if layers.format.problem(*shape)]
        return layers.sparing(dict.fromkeys(odd, NOTHING))

    def _learn(self, asked: Asked, emulator: Emulator) -> None:
        """Take over the means and moments that a judge has measured."""
        name = asked.component.name
        self.means[name] = {first: encode_mean(mean) for first, mean in emulator.means.items()}
        self.moments.pop(name, None)
        if emulator.moments:
            self.moments[name] = {n: encode_bytes(raw) for n, raw in emulator.moments.items()}

    def _known_of(self, asked: Asked) -> tuple[Means, Moments]:
        name = asked.component.name
        return self.means.get(name, {}), self.moments.get(name, {})

    def _layers(self, asked: Asked, recipe: Recipe) -> Layers:
        return layers_of(asked, self._checkpoint, recipe, None, *self._known_of(asked))

    def _output_judge(self, asked: Asked, emulator: Emulator) -> OutputJudge:
        """The judge of a component before the transformer, which runs text encoders once."""
        name = asked.component.name
        if name not in self._judges:
            self._judges[name] = OutputJudge(emulator, self._inputs(name))
        return self._judges[name]

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
