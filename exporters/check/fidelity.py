"""How much of each quantized layer's output is left: its signal-to-quantization-noise ratio.

Everything is read back from the exported file, scales and bytes, and applied to what the float32
network feeds each linear and each attention: a wrong scale shows, whoever wrote it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from exporters.calibrate.ranges import linears
from exporters.calibrate.trajectory import Calibration, start_samples, take_step
from exporters.check.readback import QuantizedAttention, read_attentions, read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Stage
from exporters.components.registry import COMPONENTS
from exporters.components.run import ReplaceAttention, watch_linears
from exporters.formats import EightBits, QuantizedLinear
from fluxdeploy.bundle.recipe import NOTHING, Recipe
from fluxdeploy.errors import ExportError, NumericError
from fluxdeploy.progress import Progress

__all__ = ["LIMIT", "measure_fidelity"]

LIMIT = 144.0
"""dB: the rounding of float32 itself. No ratio is further from 0, so that all of them are finite
numbers."""

_FARTHEST = 16.0
"""How many times past its largest value a tensor's scale may reach. In a floating-point type a
scale that is far too large costs nothing until values vanish: no ratio would show it. Bounds,
headroom and the way from one step to another make 3 times of it in `demo:dev`."""

_INPUTS = re.compile(r"(.*\.attn)\.(?:to_[qkv]|add_[qkv]_proj)")


def measure_fidelity(
    checkpoint: Checkpoint,
    onnx_path: Path,
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress,
) -> dict[str, float]:
    """The SQNR in dB of each quantized layer of an exported transformer, in order.

    10 log10 of the power of a layer's exact values over that of their error, over all samples of a
    calibration, at the step in the middle of its schedule. Of a linear they are x Wᵀ, where x is
    what it takes in the float32 network. An attention in 8 bits has four layers:
    "transformer_blocks.0.attn.query", "key" and "value" are its inputs, Q scaled and both turned by
    RoPE, and "output" is what it gives of the three. One stage of the network is in memory at a
    time.

    Raises `ExportError` for a graph that cannot be read, or in which other linears are quantized
    than the large ones of this checkpoint that `recipe` does not spare, `NumericError` for a scale
    of attention that is far too large for its values, and what `measure_ranges` raises.
    """
    chain, weights = COMPONENTS["transformer"].source(checkpoint, "fp32")
    found, attentions = read_linears(onnx_path), read_attentions(onnx_path)
    expected = [name for name in linears(chain) if recipe.spared.get(name) != NOTHING]
    for name in sorted(found.keys() ^ set(expected)):
        state = "is quantized, which must not be" if name in found else "is not quantized"
        raise ExportError(f"{onnx_path} does not fit this checkpoint: {name} {state}.")
    middle = calibration.steps // 2
    samples = start_samples(checkpoint, calibration, progress)
    task = progress.task("Measuring quantization noise", (middle + 1) * len(chain.stages))
    for step in range(middle):
        take_step(chain, weights, samples, step, after=task.advance)
    meter = _Meter(onnx_path, found, attentions)
    enter_linears = watch_linears(chain, meter.see_linear)

    def enter(stage: Stage) -> None:
        meter.scope = stage.scope
        enter_linears(stage)

    with ReplaceAttention(meter.attend):
        take_step(chain, weights, samples, middle, enter, task.advance)
    meter.check_reach()
    layers = _layers(linears(chain), attentions)
    return {name: meter.ratio(name) for name in layers if recipe.spared.get(name) != NOTHING}


def _layers(linears: tuple[str, ...], attentions: Mapping[str, object]) -> Iterator[str]:
    """The names of all layers, each attention's after the linears that feed it."""
    for name, following in zip(linears, (*linears[1:], ""), strict=True):
        yield name
        fed = _INPUTS.fullmatch(name)
        if fed and fed[1] in attentions and not _INPUTS.fullmatch(following):
            yield from (f"{fed[1]}.{part}" for part in ("query", "key", "value", "output"))


class _Meter:
    """Sums up the power of the layers' exact values and of their errors."""

    def __init__(
        self,
        path: Path,
        linears: Mapping[str, QuantizedLinear],
        attentions: Mapping[str, QuantizedAttention],
    ) -> None:
        self.scope = ""
        self._signal: dict[str, float] = defaultdict(float)
        self._noise: dict[str, float] = defaultdict(float)
        self._largest: dict[str, float] = defaultdict(float)
        self._reach: dict[str, float] = {}
        self._path = path
        self._linears = linears
        self._attentions = attentions

    def see_linear(self, name: str, linear: nn.Linear, x: Tensor, output: Tensor) -> None:
        quantized = self._linears.get(name)
        if quantized is None:
            return
        rows, columns = linear.weight.shape
        if not quantized.fits(rows, columns):
            raise ExportError(
                f"{self._path} does not fit this checkpoint: {name} is not {rows}x{columns}, or "
                "its scales are not of such a weight."
            )
        # The bias is no part of what is rounded, but what was added to it for that is.
        bias = linear.bias.detach()
        product = quantized.narrow(x) @ quantized.dequantized()
        self._add(name, output - bias, product + (quantized.added() - bias))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shares: Tensor) -> Tensor:
        """An attention as it is, which is measured."""
        output = shares @ value
        self._see_attention(query, key, value, output)
        return output

    def _see_attention(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        name = f"{self.scope}attn"
        quantized = self._attentions.get(name)
        if quantized is None:
            return
        numbers = quantized.numbers
        narrow = [
            self._narrow(f"{name}.{part}", numbers, x, scale)
            for part, x, scale in (
                ("query", query, quantized.query),
                ("key", key, quantized.key),
                ("value", value, quantized.value),
            )
        ]
        # A head at a time: the scores of all of them are the largest tensors of the network.
        heads = zip(*(x.unbind(1) for x in (*narrow, output)), strict=True)
        for q, k, v, exact in heads:
            shares = numbers.emulate(torch.softmax(q @ k.mT, dim=-1), quantized.softmax)
            self._add(f"{name}.output", exact, shares @ v)

    def _narrow(self, name: str, numbers: EightBits, x: Tensor, scale: float) -> Tensor:
        self._reach[name] = scale * numbers.largest
        self._largest[name] = max(self._largest[name], x.abs().max().item())
        narrow = numbers.emulate(x, scale)
        self._add(name, x, narrow)
        return narrow

    def _add(self, name: str, exact: Tensor, found: Tensor) -> None:
        self._signal[name] += _power(exact)
        self._noise[name] += _power(found - exact)

    def check_reach(self) -> None:
        """Raise `NumericError` where a static scale is far too large for its values."""
        for name, reach in self._reach.items():
            largest = self._largest[name]
            if reach > _FARTHEST * largest > 0:
                raise NumericError(
                    f"The scale of {name} in {self._path} is for values up to {reach:.3g}, and "
                    f"they are {largest:.3g} at most: at most {_FARTHEST:g} times as much is "
                    "allowed. Measure the ranges of this checkpoint and build again."
                )

    def ratio(self, name: str) -> float:
        """A layer's SQNR in dB."""
        signal, noise = self._signal[name], self._noise[name]
        if noise == 0:
            return LIMIT
        if signal == 0 or not math.isfinite(noise):
            return -LIMIT
        return max(-LIMIT, min(LIMIT, 10 * math.log10(signal / noise)))


def _power(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
