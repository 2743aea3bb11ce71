"""Quantizes the MM-DiT of a checkpoint; `quantize_scale.py` measures this process, and kills it.

    python quantize_worker.py CHECKPOINT OUTPUT PRECISION

Works as a build does, with finished weight files remembered in a staging folder. Prints a JSON
object a line: for each weight file whether an earlier run had made it, and when one that is missing
is whole; then the totals.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

from export_worker import peak_bytes

from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.calibrate.trajectory import default_calibration
from exporters.checkpoint import open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.weights.bind import WeightFolder
from fluxdeploy.build.components import WeightArtifacts
from fluxdeploy.build.staging import Staging


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
    chain, _ = COMPONENTS["transformer"].source(checkpoint, "fp32")
    # A sparse checkpoint's activations are all the same: 1 stands for each of them.
    ranges = ActivationRanges(
        "",
        default_calibration(checkpoint),
        dict.fromkeys(linears(chain), 1.0),
        *(dict.fromkeys(attentions(chain), 1.0) for _ in range(3)),
    )
    with Staging(output) as staging:
        weights = WeightFolder(staging.root / "onnx" / "weights")
        for name in ("conditioner", "transformer"):
            started = time.perf_counter()
            component = COMPONENTS[name]
            spec = specify(checkpoint, component, component.precision_beside(precision))
            assert spec.layers is not None
            exported = export_component(
                spec.with_layers(replace(spec.layers, ranges=ranges)),
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


if __name__ == "__main__":
    main(*sys.argv[1:])
