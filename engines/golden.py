"""The numeric gate: an engine's outputs held against PyTorch's, recorded as golden tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, GoldenRecord, QualityRecord
from fluxdeploy.bundle.tensorfile import read_header, read_tensor
from fluxdeploy.errors import BundleError, NumericError

__all__ = [
    "COMPONENT_GATES",
    "OBJECTS_PICTURES",
    "QUALITY_GATES",
    "Deviation",
    "is_emulated",
    "measure_component",
    "objects_kept",
    "require",
]

Array = NDArray[Any]

COMPONENT_GATES = {
    "fp32": (1e-3, 0.99999),
    "fp16": (5e-2, 0.999),
    "bf16": (1e-1, 0.995),
    "fp8": (2.5e-1, 0.99),
    "fp8-linears": (2.5e-1, 0.99),
    "fp8-weights": (1e-1, 0.995),
    "int8": (2.5e-1, 0.99),
    "int8-dynamic": (2e-1, 0.995),
    "int8-weights": (2e-1, 0.995),
    "fp4": (5e-1, 0.95),
}
"""Largest error, relative to the largest output, and smallest cosine, by precision.

A row of a linear that holds one outlier has few of int8's steps left for the rest: `demo:dev`'s T5
in int8-weights is off by 0.13 at one place, with a cosine of 0.998.
"""

QUALITY_GATES: Mapping[str, QualityRecord] = {
    "fp32": QualityRecord(45.0, 0.99, None),
    "fp16": QualityRecord(30.0, 0.9, None),
    "bf16": QualityRecord(25.0, 0.85, None),
    "fp8": QualityRecord(22.0, 0.82, 16.0),
    "fp8-linears": QualityRecord(22.0, 0.82, 20.0),
    "fp8-weights": QualityRecord(25.0, 0.85, 24.0),
    "int8": QualityRecord(20.0, 0.8, 12.0),
    "int8-dynamic": QualityRecord(24.0, 0.82, 15.0),
    "int8-weights": QualityRecord(25.0, 0.85, 20.0),
    "fp4": QualityRecord(15.0, 0.6, 12.0),
}
"""What `verify` holds whole pictures and single layers against, by the transformer's precision.

E4M3 rounds by up to 1/16 of a value, whatever its size: the worst linears of the demo checkpoints
have 30 dB with quantized weights alone and 27 with their inputs, and less means a wrong scale. Q, K
and V have 31 dB there. Attention's output has 27, and 21 with random weights, where all shares of a
row round the same way; a scale that is 16 times too small leaves 6 at most.
INT8's steps are as wide as the largest value of a tensor demands: 33 dB there, and outliers cost
20. The medians over the demo checkpoints' pictures are over 40 dB, but one picture may have to do,
and single ones have 25 where a step goes another way. FP4's linears have 16.6 dB at least there and
20 in the median; what that leaves of whole pictures is an estimate, for want of a GPU that has FP4.
"""

OBJECTS_PICTURES = 20
"""How many pictures it takes to compare objects: of fewer, one more or less would decide."""

_OBJECTS_LOST = 0.1
"""The largest share of pictures that may lose their objects."""


@dataclass(frozen=True)
class Deviation:
    """How far tensors are from their references.

    max_error: max|x − r| / max|r|. cosine: of the flattened tensors. psnr: in dB, with max|r| as
    the peak. Of several tensors the worst.
    """

    max_error: float
    cosine: float
    psnr: float

    @classmethod
    def of(cls, values: Array, reference: Array) -> Deviation:
        """Compare two arrays of one shape. A non-finite value is an infinite error."""
        x, r = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        peak = float(np.abs(r).max()) or 1.0
        difference = np.abs(x - r)
        if not np.isfinite(difference).all():
            return cls(float("inf"), -1.0, 0.0)
        norms = float(np.linalg.norm(x) * np.linalg.norm(r))
        mse = float(np.square(difference).mean())
        return cls(
            max_error=float(difference.max()) / peak,
            # Rounding takes the cosine of equal vectors past 1.
            cosine=min(float(x @ r) / norms, 1.0) if norms else float((x == r).all()),
            psnr=10 * float(np.log10(peak**2 / mse)) if mse else float("inf"),
        )

    def within(self, golden: GoldenRecord) -> bool:
        """Whether this is inside a component's gate."""
        return self.max_error <= golden.max_error and self.cosine >= golden.min_cosine

    def worst(self, other: Deviation) -> Deviation:
        """The worse of each figure."""
        return Deviation(
            max(self.max_error, other.max_error),
            min(self.cosine, other.cosine),
            min(self.psnr, other.psnr),
        )


def measure_component(engine: Engine, golden: Path) -> Deviation:
    """Run an engine on the golden inputs; how far its outputs are from the golden outputs.

    Raises `BundleError` for a golden file that does not fit the component.
    """
    inputs, outputs = _read_golden(golden)
    result = engine.run(inputs)
    if result.keys() != outputs.keys():
        raise BundleError(f"{golden} holds other outputs than {engine.component} has. Rebuild it.")
    deviation = Deviation(0.0, 1.0, float("inf"))
    for name, reference in outputs.items():
        if result[name].shape != reference.shape:
            raise BundleError(f"{golden} holds {name} in another shape than the engine's.")
        deviation = deviation.worst(Deviation.of(result[name], reference))
    return deviation


def require(component: str, deviation: Deviation, golden: GoldenRecord) -> None:
    """Raise `NumericError` where a component is past its gate."""
    if not deviation.within(golden):
        raise NumericError(
            f"{component} is off PyTorch by {deviation.max_error:.2g} of its range (cosine "
            f"{deviation.cosine:.6f}); allowed are {golden.max_error:g} and "
            f"{golden.min_cosine:g}. Use a wider precision for it."
        )


def is_emulated(record: ComponentRecord, engine: EngineRecord) -> bool:
    """Whether an engine only has the numbers of its precision, and not its speed.

    No CPU multiplies in FP8: there the values are rounded to it, and multiplied in `compute`.
    """
    return record.precision.startswith("fp8") and engine.target == "cpu"


def objects_kept(share: float, reference: float, pictures: int) -> bool:
    """Whether a bundle draws the right objects about as often as PyTorch does."""
    lost = reference - share
    # The shares are multiples of 1 / pictures, which floats round.
    return pictures < OBJECTS_PICTURES or lost <= _OBJECTS_LOST + 0.01 / pictures


def _read_golden(path: Path) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    file = read_header(path)
    sides: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    for name in file.tensors:
        side, _, tensor = name.partition(".")
        if side not in sides:
            raise BundleError(f"{path} holds the tensor {name!r}, which is no input or output.")
        sides[side][tensor] = read_tensor(file, name)
    return sides["input"], sides["output"]
