"""Quantizes the MM-DiT of a checkpoint; `quantize_scale.py` measures this process, and kills it.

    python quantize_worker.py CHECKPOINT OUTPUT PRECISION

Works as a build does that is given a calibration file with means and moments of what linears read,
with finished weight files remembered in a staging folder. Prints a JSON object a line: for each
weight file whether an earlier run had made it, and when one that is missing is whole; then the
totals.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path

import numpy as np
from export_worker import peak_bytes

from exporters.calibrate.means import encode_bytes, encode_mean
from exporters.calibrate.range_file import CalibrationFile, read_calibration, write_calibration
from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.calibrate.trajectory import default_calibration
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.component import Component
from exporters.components.registry import COMPONENTS
from exporters.components.run import linear_modules, shared_inputs
from exporters.export import export_component, specify
from exporters.formats.moments import BLOCK, encode_moments
from exporters.quality.recipes import Asked, layers_of
from exporters.weights.bind import WeightFolder
from fluxdeploy.build.components import WeightArtifacts
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.recipe import Recipe

_COMPONENTS = ("conditioner", "transformer")


class Telling(WeightArtifacts):
    """Artifacts that are told of as they come."""

    def finished(self, file: str) -> bool:
        found = super().finished(file)
        _tell(file=file, resumed=found)
        return found

    def record(self, file: str, sha256: str) -> None:
        super().record(file, sha256)
        size = (self._staging.root / "onnx" / "weights" / file).stat().st_size
        _tell(file=file, written=size)


def _tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main(source: str, output: str, precision: str) -> None:
    """Quantize the conditioner and the transformer of `source` into the staging folder."""
    checkpoint = open_checkpoint(source)
    file = Path(f"{output}.calibration.json")
    if not file.exists():
        write_calibration(_calibration(checkpoint), file)
    found = read_calibration(file, checkpoint, None)
    with Staging(output) as staging:
        weights = WeightFolder(staging.root / "onnx" / "weights")
        for name in _COMPONENTS:
            started = time.perf_counter()
            component = COMPONENTS[name]
            asked = Asked(component, component.precision_beside(precision), "bf16")
            known = found.means[name], found.moments[name]
            layers = layers_of(asked, checkpoint, Recipe(), found.ranges, *known)
            exported = export_component(
                specify(checkpoint, component, asked.precision).with_layers(layers),
                weights,
                ledger=Telling(staging, f"{source} {precision} {name}"),
            )
            _tell(
                component=name,
                seconds=time.perf_counter() - started,
                weight_bytes=exported.weight_bytes,
                quantized=exported.quantized,
            )
    _tell(peak=peak_bytes())


def _calibration(checkpoint: Checkpoint) -> CalibrationFile:
    """A sparse checkpoint's activations are all the same: 1 stands for each of them."""
    chain, _ = COMPONENTS["transformer"].source(checkpoint, "fp32")
    widths = _inputs(COMPONENTS["transformer"], checkpoint)
    ranges = ActivationRanges(
        "",
        default_calibration(checkpoint),
        dict.fromkeys(linears(chain), 1.0),
        *(dict.fromkeys(attentions(chain), 1.0) for _ in range(3)),
        {first: base64.b64encode(bytes([128]) * width).decode() for first, width in widths.items()},
    )
    read = {name: _inputs(COMPONENTS[name], checkpoint) for name in _COMPONENTS}
    means = {
        name: {first: encode_mean(np.ones(width, np.float32)) for first, width in widths.items()}
        for name, widths in read.items()
    }
    moments = {
        name: {first: encode_bytes(_moments(width)) for first, width in widths.items()}
        for name, widths in read.items()
    }
    return CalibrationFile("", ranges, {}, means, moments)


def _moments(width: int) -> np.ndarray:
    """Channels that move together by half."""
    covariances = np.full((width // BLOCK, BLOCK, BLOCK), 0.5, np.float32)
    return encode_moments(covariances + 0.5 * np.eye(BLOCK, dtype=np.float32))


def _inputs(component: Component, checkpoint: Checkpoint) -> dict[str, int]:
    """The widths of what quantized linears read, by the first that does."""
    chain, _ = component.source(checkpoint, "fp32")
    first = shared_inputs(chain)
    return {
        stage.scope + name: module.in_features
        for stage in chain.stages
        for name, module in linear_modules(stage.piece).items()
        if component.is_quantized(stage.scope + name)
        and first[stage.scope + name] == stage.scope + name
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
