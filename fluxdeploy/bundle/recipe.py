"""The recipe of a quantized component: where it departs from its precision, for its quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fluxdeploy.bundle.typed_json import FieldError, join

__all__ = ["NOTHING", "WEIGHTS", "Promise", "Quality", "Recipe", "RecipeRecord", "check_recipe"]

WEIGHTS, NOTHING = "weights", "nothing"
"""What is left of a spared layer's quantization: that of its weight alone, or none of it."""

_MAX_LAYERS = 1 << 14


@dataclass(frozen=True)
class Recipe:
    """Where a component departs from its precision.

    spared: by the name of a linear, what of it is still quantized: `weights`, its weight and not
        its input, or `nothing`. An attention, such as `transformer_blocks.0.attn`, has `nothing`.
    smoothed: by the first of the linears that read it, an input whose outlying channels are scaled
        down, and the weights' up as much: the exponent of SmoothQuant, above 0 and below 1.
    """

    spared: Mapping[str, str] = field(default_factory=dict)
    smoothed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """How near something in few bits is to float32.

    cosine: of a component's output, the median or, of a text encoder or the conditioner, the least.
    psnr, ssim: medians over pictures, the ratio in dB; null where no pictures were made.
    least_psnr: of the worst picture. worst_layer: the least signal-to-quantization-noise ratio of
    a layer by itself, in dB; null where nothing is quantized, too.
    """

    cosine: float
    psnr: float | None = None
    ssim: float | None = None
    least_psnr: float | None = None
    worst_layer: float | None = None


@dataclass(frozen=True)
class Promise:
    """What a component has to keep at least of a `Quality`; null is not asked for."""

    cosine: float | None = None
    psnr: float | None = None
    ssim: float | None = None

    def missing(self, quality: Quality) -> float:
        """How much less noise it would take, in dB; 0 or less where the promise is kept."""
        gaps = [-math.inf]
        if self.psnr is not None and quality.psnr is not None:
            gaps.append(self.psnr - quality.psnr)
        if self.ssim is not None and quality.ssim is not None:
            gaps.append(_decibels(1 - quality.ssim, 1 - self.ssim))
        if self.cosine is not None:
            gaps.append(_decibels(1 - quality.cosine, 1 - self.cosine))
        return max(gaps)


def _decibels(loss: float, allowed: float) -> float:
    return 10 * math.log10(max(loss, 1e-12) / max(allowed, 1e-12))


@dataclass(frozen=True)
class RecipeRecord:
    """A recipe, and what it was found for and does.

    precision: of the component. promise: what it had to keep. before, after: its quality without
    the recipe and with it, as computed in PyTorch; null where nothing was judged. share: of the
    weights that the precision quantizes, those that are not. extra_bytes: what these take more.
    """

    precision: str
    promise: Promise
    recipe: Recipe
    before: Quality | None
    after: Quality | None
    share: float
    extra_bytes: int


def check_recipe(record: RecipeRecord, where: str) -> None:
    """Raise `FieldError` for a recipe that nothing can be made of."""
    recipe, where = record.recipe, join(where, "recipe")
    for name in ("spared", "smoothed"):
        count = len(getattr(recipe, name))
        if count > _MAX_LAYERS:
            raise FieldError(join(where, name), f"has {count} layers; {_MAX_LAYERS} are the most")
    for layer, left in recipe.spared.items():
        if left not in (WEIGHTS, NOTHING):
            raise FieldError(
                join(join(where, "spared"), layer),
                f"is {left!r}; it must be {WEIGHTS!r} or {NOTHING!r}",
            )
    for layer, strength in recipe.smoothed.items():
        if not 0 < strength < 1:
            raise FieldError(
                join(join(where, "smoothed"), layer),
                f"is {strength}; it must be above 0 and below 1",
            )
