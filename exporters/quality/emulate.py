"""A component in few bits, in PyTorch: what its layers round away, as a recipe has them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.checkpoint import Checkpoint
from exporters.components.chain import Stage
from exporters.components.component import Component
from exporters.components.run import (
    ReplaceAttention,
    linear_modules,
    run_samples,
    shared_inputs,
)
from exporters.formats import EightBits
from exporters.formats.base import lost
from exporters.formats.moments import encode_moments
from exporters.quality.input_sums import InputSums
from exporters.quality.layers import Layers

__all__ = ["Emulator"]

Array = NDArray[np.generic]

_CACHED, _CACHE = 16 << 20, 256 << 20
"""Bytes of the largest weight that is kept once it is rounded, and of all of them."""

_COMPUTE = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


class Emulator:
    """A component in PyTorch float32 whose linears and attentions can be had as `Layers` say.

    `compute` is the type of the scales: that of all which is not quantized in a graph, and which is
    float32 here.

    `moments` says whether second moments of inputs are measured too: `Format.takes_moments`.

    chain, weights: of the component in float32. large: its linears that a quantized precision
    quantizes. attentions: the names that those of a transformer's blocks have, one for each stage.
    enter: to be called before each stage by whoever runs stages by themselves.

    Raises what `Component.source` does.
    """

    def __init__(
        self, component: Component, checkpoint: Checkpoint, compute: str, moments: bool = False
    ) -> None:
        self.chain, self.weights = component.source(checkpoint, "fp32")
        self._layers: Layers | None = None
        chain = self.chain
        names = (s.scope + name for s in chain.stages for name in linear_modules(s.piece))
        self.large = tuple(name for name in names if component.is_quantized(name))
        self.attentions = tuple(f"{stage.scope}attn" for stage in chain.stages)
        self._scales = _COMPUTE[compute]
        self._scope = ""
        self._beside: Callable[[Stage], None] = lambda stage: None
        self._powers: dict[str, tuple[float, float]] | None = None
        self._kept: dict[tuple[str, str, bytes], tuple[Tensor, Tensor | None]] = {}
        self._size = 0
        self._first: Mapping[str, str] = {}
        self._with_moments = moments
        self._sums: dict[str, InputSums] | None = None
        # By the first of the linears that read it: the mean of an input's channels, [in], and its
        # moments as `encode_moments` has them.
        self.means: dict[str, NDArray[np.float32]] = {}
        self.moments: dict[str, NDArray[np.uint8]] = {}
        quantized = frozenset(self.large)
        for piece in chain.pieces:
            for name, module in linear_modules(piece).items():
                usual = module.forward
                module.forward = functools.partial(  # type: ignore[method-assign]
                    self._forward, name, module, usual, quantized
                )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A block in which the chain runs in float32, from which `means` and `moments` are known.

        Of the inputs of large linears that have a bias. Whoever runs the chain calls `enter`.
        """
        self._sums, self._first = {}, shared_inputs(self.chain)
        try:
            yield
            sums = self._sums
        finally:
            self._sums = None
        self.means = {name: known.mean() for name, known in sums.items()}
        self.moments = {
            name: encode_moments(known.covariances())
            for name, known in sums.items()
            if self._with_moments
        }

    def put_beside(self, enter: Callable[[Stage], None]) -> None:
        """Have `enter` called before each stage too: see `run_side_paths`."""
        self._beside = enter

    def enter(self, stage: Stage) -> None:
        self._scope = stage.scope
        self._beside(stage)

    def run(
        self,
        samples: Sequence[Mapping[str, Array]],
        layers: Layers | None,
        after: Callable[[], None] = lambda: None,
    ) -> list[dict[str, Array]]:
        """The component's outputs by name for several samples; see `run_samples`."""
        with self.running(layers):
            return run_samples(self.chain, self.weights, samples, self.enter, after)

    def worst_layer(self, samples: Sequence[Mapping[str, Array]], layers: Layers) -> float:
        """The least signal-to-quantization-noise ratio of a layer, in dB, over several samples.

        Of linears, and of what quantized attentions give, each fed what the float32 network has.
        Infinite where nothing is quantized.
        """
        self._powers = {}
        try:
            self.run(samples, layers)
            powers = self._powers
        finally:
            self._powers = None
        ratios = [
            10 * math.log10(signal / noise) for signal, noise in powers.values() if signal and noise
        ]
        return min(ratios, default=math.inf)

    def _measured(self, name: str, exact: Tensor, found: Tensor) -> Tensor:
        """What goes on in the network: what was found, or what is exact while it is measured."""
        if self._powers is None:
            return found
        signal, noise = self._powers.get(name, (0.0, 0.0))
        signal += float(exact.double().square().sum())
        noise += float((found.double() - exact.double()).square().sum())
        self._powers[name] = signal, noise
        return exact

    @contextmanager
    def running(self, layers: Layers | None) -> Iterator[None]:
        """A block in which the chain computes as `layers` has it."""
        before, self._layers = self._layers, layers
        try:
            if layers is None or not layers.quantization.attention:
                yield
            else:
                with ReplaceAttention(self._attend):
                    yield
        finally:
            self._layers = before

    def _forward(
        self,
        local: str,
        linear: nn.Linear,
        usual: Callable[[Tensor], Tensor],
        quantized: frozenset[str],
        x: Tensor,
    ) -> Tensor:
        layers, name = self._layers, self._scope + local
        if self._sums is not None and name in quantized and linear.bias is not None:
            self._add_up(name, x)
        if layers is None or name not in quantized or not layers.has_weight(name):
            return usual(x)
        factors = layers.smooths(name)
        narrow = x if factors is None else x * torch.from_numpy(factors)
        activations = layers.activations(name)
        largest = layers.largest(name) if activations == "static" else 0.0
        narrow = layers.format.emulate_input(narrow, activations, largest)
        weight, added = self._weight(name, linear.weight)
        found = torch.nn.functional.linear(narrow, weight, linear.bias)
        if added is not None and linear.bias is not None:
            found = found + added
        # A bias is no part of what is rounded: it would hide the rest.
        bias = 0.0 if self._powers is None or linear.bias is None else linear.bias
        exact = found if self._powers is None else usual(x)
        return self._measured(name, exact - bias, found - bias) + bias

    def _add_up(self, name: str, x: Tensor) -> None:
        assert self._sums is not None
        if self._first[name] != name:
            return
        if name not in self._sums:
            self._sums[name] = InputSums(x.shape[-1], self._with_moments)
        self._sums[name].add(x.flatten(0, -2))

    def _weight(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """A weight as it is rounded, and what its linear's bias has besides."""
        layers = self._layers
        assert layers is not None
        factors = layers.smooths(name)
        mean = layers.mean(name)
        known = (factors, mean, layers.moments.get(name))
        vectors = (b"" if vector is None else vector.tobytes() for vector in known)
        key = (name, layers.format.name, b"/".join(vectors))
        if key in self._kept:
            return self._kept[key]
        scales = None if factors is None else torch.from_numpy(factors)
        found = layers.format_of(name).emulate_weight(
            weight if scales is None else weight / scales, self._scales
        )
        added = None if mean is None else lost(weight, found, scales, torch.from_numpy(mean))
        if found.nbytes <= _CACHED and self._size + found.nbytes <= _CACHE:
            self._kept[key] = found, added
            self._size += found.nbytes
        return found, added

    @property
    def scale_bytes(self) -> int:
        """Bytes of a number of the compute type."""
        return int(self._scales.itemsize)

    @property
    def _attention(self) -> tuple[EightBits, str] | None:
        """The type and the name of the attention that runs, None where it is not quantized."""
        layers, name = self._layers, f"{self._scope}attn"
        if layers is None or not layers.has_attention(name):
            return None
        return layers.format.attention, name

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, shares: Tensor) -> Tensor:
        """softmax(Q Kᵀ) V in few bits, where `shares` are the exact softmax."""
        found = self._attention
        if found is None:
            return shares @ value
        reach = found[0].headroom * self._range("values", found)
        narrow_query = self._rounded(query, found, self._range("queries", found))
        narrow_key = self._rounded(key, found, self._range("keys", found))
        scores = torch.softmax(narrow_query @ narrow_key.mT, dim=-1)
        narrow = self._rounded(scores, found, 1.0) @ self._rounded(value, found, reach)
        return narrow if self._powers is None else self._measured(found[1], shares @ value, narrow)

    def _range(self, kind: str, found: tuple[EightBits, str]) -> float:
        assert self._layers is not None
        return self._layers.attention_range(kind, found[1])

    def _rounded(self, x: Tensor, found: tuple[EightBits, str], largest: float) -> Tensor:
        numbers, _ = found
        return numbers.emulate(x, numbers.step(largest, self._scales))
