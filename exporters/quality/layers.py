"""What becomes of each layer of a quantized component: its precision, less what a recipe spares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from exporters.calibrate.ranges import ActivationRanges, channel_maxima
from exporters.checkpoint import Weights
from exporters.components.chain import Chain
from exporters.components.run import shared_inputs
from exporters.formats import FORMATS, Format
from exporters.formats.base import Activations
from fluxdeploy.bundle.recipe import NOTHING, Recipe
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import Quantization

__all__ = ["Layers", "Smoother", "Smoothing"]

Floats = NDArray[np.float32]

_DOWN, _UP = 24, 2
"""The largest powers of two that a channel is scaled by. Of one that was still while it was
measured, another prompt may make more: scaled up far, it would be past its end."""


@dataclass(frozen=True)
class Smoothing:
    """What a linear's input is multiplied with, channel by channel, before it is quantized.

    factors: float32 [in], powers of two; the weight's columns are divided by them. largest: the
    largest magnitude of the product.
    """

    factors: Floats
    largest: float


@dataclass(frozen=True)
class Layers:
    """A quantized component's layers, by their names.

    ranges: what static scales come from; None where there are none.
    smoothing: by linear, of an input that is smoothed; linears that read the same have the same.
    means: by linear, of each channel of its input, float32 [in], as it is before smoothing. Its
        bias makes up for what the rounding of the weight changes of the product in the mean.
    moments: by linear, of its input, for formats whose numbers make up for each other's rounding.
    """

    quantization: Quantization
    recipe: Recipe = field(default_factory=Recipe)
    ranges: ActivationRanges | None = None
    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)
    means: Mapping[str, Floats] = field(default_factory=dict)
    moments: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        return FORMATS[self.quantization.format]

    @property
    def can_spare_inputs(self) -> bool:
        """Whether a linear may have its weight quantized alone, in place of its input too."""
        return self.quantization.activations is not None and None in self.format.activations

    def has_weight(self, linear: str) -> bool:
        """Whether the weight of one of the large linears is quantized."""
        return self.recipe.spared.get(linear) != NOTHING

    def activations(self, linear: str) -> Activations:
        """How the input of a linear with a quantized weight is quantized."""
        return None if linear in self.recipe.spared else self.quantization.activations

    def has_attention(self, name: str) -> bool:
        """Whether an attention's Q, K, V and softmax output are quantized."""
        return self.quantization.attention and name not in self.recipe.spared

    @property
    def wide_attentions(self) -> int:
        """How many attentions are not quantized though the precision says so."""
        return sum(name.endswith(".attn") for name in self.recipe.spared)

    def smooths(self, linear: str) -> Floats | None:
        """What the channels of a linear's input are multiplied with, float32 [in], if anything.

        Where the input is not quantized there is nothing to be gained by it.
        """
        if not self.has_weight(linear) or self.activations(linear) is None:
            return None
        smoothing = self.smoothing.get(linear)
        return None if smoothing is None else smoothing.factors

    def mean(self, linear: str) -> Floats | None:
        """The means that a linear's bias is corrected with, None where it is not."""
        return self.means.get(linear) if self.has_weight(linear) else None

    def format_of(self, linear: str) -> Format:
        """The format with what it takes of a linear's input."""
        return self.format.informed(self.moments.get(linear))

    def largest(self, linear: str) -> float:
        """The largest magnitude of what a linear quantizes, for its static scale.

        Raises `ExportError` where it was not measured.
        """
        if self.smooths(linear) is not None:
            return self.smoothing[linear].largest
        return _range(self.required().inputs, linear)

    def attention_range(self, kind: str, name: str) -> float:
        """The same of an attention: `kind` is `queries`, `keys` or `values`."""
        return _range(getattr(self.required(), kind), name)

    def required(self) -> ActivationRanges:
        """The ranges. Raises `ExportError` where there are none."""
        if self.ranges is None:
            raise ExportError("Static quantization needs measured activation ranges.")
        return self.ranges

    def sparing(self, spared: Mapping[str, str]) -> Layers:
        """The same with another choice of spared layers."""
        return replace(self, recipe=replace(self.recipe, spared=dict(spared)))


def _range(largest: Mapping[str, float], layer: str) -> float:
    if layer not in largest:
        raise ExportError(f"The activation ranges lack {layer}: measure them again.")
    return largest[layer]


class Smoother:
    """Scales that move outlying channels of inputs into weights.

    G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models", 2023, equation 4: s = max|x|^a / max|w|^(1 - a) for each channel, by which the
    input is divided. Rounded to a power of two it changes no digit of a number.
    """

    def __init__(self, chain: Chain, weights: Weights, ranges: ActivationRanges) -> None:
        self._weights, self._ranges = weights, ranges
        self._peaks: dict[str, Floats] = {}
        self.groups: dict[str, list[str]] = {}
        for linear, first in shared_inputs(chain).items():
            if first in ranges.channels:
                self.groups.setdefault(first, []).append(linear)

    def smooth(self, smoothed: Mapping[str, float]) -> dict[str, Smoothing]:
        """`Layers.smoothing` for a recipe's strengths.

        Raises `ExportError` for an input that was not measured.
        """
        found: dict[str, Smoothing] = {}
        for first, strength in smoothed.items():
            if first not in self.groups:
                raise ExportError(f"The activation ranges lack {first}: measure them again.")
            found |= dict.fromkeys(self.groups[first], self._of(first, strength))
        return found

    def _of(self, first: str, strength: float) -> Smoothing:
        inputs, peaks = channel_maxima(self._ranges, first), self._column_peaks(first)
        exponents = strength * np.log2(inputs) - (1 - strength) * np.log2(peaks)
        # A scale for all channels alike is the quantization's own.
        exponents -= np.median(exponents)
        rounded = np.clip(np.rint(exponents), -_UP, _DOWN)
        factors: Floats = np.exp2(-rounded).astype(np.float32)
        return Smoothing(factors, float((inputs * factors).max()))

    def _column_peaks(self, first: str) -> Floats:
        if first not in self._peaks:
            peaks: Floats | None = None
            for linear in self.groups[first]:
                stored = self._weights[f"{linear}.weight"]
                rows, columns = stored.shape
                some = max(1, (1 << 22) // columns)
                for start in range(0, rows, some):
                    part = stored.rows(start, min(start + some, rows))
                    found = np.abs(part.read().reshape(part.shape)).max(0)
                    peaks = found if peaks is None else np.maximum(peaks, found)
            assert peaks is not None
            self._peaks[first] = np.maximum(peaks, np.finfo(np.float32).tiny)
        return self._peaks[first]
