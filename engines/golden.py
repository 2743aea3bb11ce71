"""The numeric gate: an engine's outputs held against PyTorch's, recorded as golden tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from fluxdeploy.bundle.manifest import GoldenRecord
from fluxdeploy.bundle.tensorfile import read_header, read_tensor
from fluxdeploy.errors import BundleError, NumericError

__all__ = ["Deviation", "measure_component", "require"]

Array = NDArray[Any]

_MAX_GOLDEN = 256 << 20
"""Bytes. A full-size model's have some 10 MiB a component."""


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


def _read_golden(path: Path) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    file = read_header(path)
    size = sum(entry.nbytes for entry in file.tensors.values())
    if size > _MAX_GOLDEN:
        raise BundleError(
            f"{path} holds {size} bytes of tensors; at most {_MAX_GOLDEN} are allowed. Rebuild it."
        )
    sides: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    for name in file.tensors:
        side, _, tensor = name.partition(".")
        if side not in sides:
            raise BundleError(f"{path} holds the tensor {name!r}, which is no input or output.")
        sides[side][tensor] = read_tensor(file, name)
    return sides["input"], sides["output"]
