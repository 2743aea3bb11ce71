"""A bundle's quantized layers held against PyTorch float32, with the manifest's threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engines.graph_files import check_graph
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.recipe import Recipe
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["LayersReport", "compare_layers"]

_LAYER_PROMPTS = 2
"""A layer's noise hardly depends on the prompt: these few, in one size, show a wrong scale."""


@dataclass(frozen=True)
class LayersReport:
    """Signal-to-quantization-noise ratios, in dB, of the transformer's quantized layers.

    These are its linears and, where attention is quantized, Q, K, V and the output of each block's,
    in the network's order. `min_sqnr` None is no gate.
    """

    sqnr: Mapping[str, float]
    min_sqnr: float | None

    @property
    def passed(self) -> bool:
        """Whether every layer is within the gate."""
        return self.min_sqnr is None or min(self.sqnr.values()) >= self.min_sqnr

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The layers with the most noise, worst first."""
        return sorted(self.sqnr.items(), key=lambda layer: layer[1])[:count]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "worst": self.worst(1)[0][0],
            "min_sqnr": self.min_sqnr,
            "passed": self.passed,
            "sqnr": dict(self.sqnr),
        }


def compare_layers(
    bundle: Bundle, checkpoint: Checkpoint, progress: Progress
) -> LayersReport | None:
    """The layers' noise, of weights and scales in the bundle; None where nothing is quantized."""
    record = bundle.manifest.components["transformer"]
    if PRECISIONS[record.precision].quantization is None:
        return None
    from exporters.calibrate.trajectory import default_calibration
    from exporters.check.fidelity import measure_fidelity

    usual = default_calibration(checkpoint)
    few = replace(usual, prompts=usual.prompts[:_LAYER_PROMPTS], sizes=usual.sizes[:1])
    (graph,) = (file.path for file in record.files if file.path.endswith(".onnx"))
    with bundle.unchanged(record.files):
        check_graph(bundle, record, graph)
        recipe = Recipe() if record.recipe is None else record.recipe.recipe
        sqnr = measure_fidelity(checkpoint, bundle.path(graph), recipe, few, progress)
    return LayersReport(sqnr, bundle.manifest.quality.min_sqnr)
