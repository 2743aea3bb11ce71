"""Quality against size: what every precision leaves of pictures, and what its bundle takes.

Builds the default model and a hard random one in each precision. All bundles draw the same prompts
from the same seeds with the numbers of their graphs, emulated on the CPU, so that FP4 is among
them, which only GPUs run; PyTorch in float32 is what they are held against.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
from recipes import add_outliers, shapes
from rich.console import Console
from rich.table import Table

from engines import Engine, EngineOptions
from fluxdeploy.build.build import build
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import describe_machine
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from fluxdeploy.similarity import psnr, ssim
from fluxdeploy.text import load_tokenizers
from fluxdeploy.verify.pictures import Drawing, choose_prompts, choose_scenes, draw
from fluxdeploy.verify.reference import ReferenceEngine
from tests.support.checkpoints import make_checkpoint
from tests.support.traces import Traces

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy")
DEMO = "demo:dev"
_MARKS = "osD^v<>Pp*X"
_CALIBRATED = "int8"
_ELSEWHERE = {"int8": ("openvino", ("cpu",)), "fp4": ("tensorrt-rtx", ("sm120",))}
"""What builds precisions that ONNX Runtime has not on a CPU."""


@click.command()
@click.option("--pictures", default=16, show_default=True, help="Prompts, each with its seed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw this PNG (matplotlib).")
def main(pictures: int, json_file: Path | None, plot: Path | None) -> None:
    """Build two models in every precision, and compare their pictures and sizes."""
    found: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="quality-size-") as place,
        # Most of a small build, and the same for every precision that computes in one type.
        mock.patch("exporters.export.trace_chain", Traces(Path(place) / "traces")),
        Progress() as progress,
    ):
        for name, checkpoint in _checkpoints(Path(place)):
            found[name] = _measure(checkpoint, Path(place) / "bundles" / name, pictures, progress)
    report = {"machine": describe_machine(PACKAGES), "pictures": pictures, "checkpoints": found}
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot_report(report, plot)


def _checkpoints(place: Path) -> Iterator[tuple[str, str]]:
    """By their names: the default model, and the first of the odd ones of recipes.py."""
    yield DEMO, DEMO
    shape, factor = next(shapes())
    folder = make_checkpoint(place / "random", shape)
    add_outliers(folder, factor)
    yield "random", str(folder)


def _measure(
    checkpoint: str, folder: Path, pictures: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    drawing: Drawing | None = None
    rows: dict[str, dict[str, Any]] = {}
    # One has all measured that the others need. No layer is spared: that is for recipes.py.
    first = folder / _CALIBRATED
    for precision in sorted(PRECISIONS, key=lambda name: name != _CALIBRATED):
        runtime, targets = _ELSEWHERE.get(precision, ("onnxruntime", ("cpu",)))
        request = BuildRequest(
            checkpoint,
            precision,
            runtimes=(runtime,),
            targets=targets,
            calibration=first / "calibration.json" if precision != _CALIBRATED else None,
            promise=Promise() if precision != _CALIBRATED else None,
        )
        bundle = build(request, folder / precision, progress)
        if drawing is None:
            choose = choose_scenes if checkpoint == DEMO else choose_prompts
            drawing = choose(bundle, pictures)
            with _reference(bundle, checkpoint) as pipe:
                expected = draw(pipe, drawing, "Drawing with PyTorch float32", progress)
        with FluxPipeline.from_bundle(bundle.root, "emulate", EngineOptions()) as pipe:
            drawn = draw(pipe, drawing, f"Drawing in {precision}", progress)
        rows[precision] = {
            "bytes": _size(bundle),
            "psnr": [psnr(a, b) for a, b in zip(drawn, expected, strict=True)],
            "ssim": [ssim(a, b) for a, b in zip(drawn, expected, strict=True)],
        }
    return {precision: rows[precision] for precision in PRECISIONS}


def _reference(bundle: Bundle, name: str) -> FluxPipeline:
    checkpoint = find_checkpoint(name)

    def open_reference(component: str) -> Engine:
        return ReferenceEngine(checkpoint, component)

    return FluxPipeline(bundle, load_tokenizers(bundle), open_reference)


def _size(bundle: Bundle) -> int:
    """Bytes of a bundle's graphs and weights: a GPU's engines hold the weights once more."""
    records = [file for c in bundle.manifest.components.values() for file in c.files]
    sizes = {file.path: file.size for file in records if file.path.startswith("onnx/")}
    return sum(sizes.values())


def show(report: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table("checkpoint", "precision", title=f"{report['pictures']} pictures")
    for heading in ("MB", "PSNR, median", "least", "SSIM, median"):
        table.add_column(heading, justify="right")
    for name, rows in report["checkpoints"].items():
        for precision, row in rows.items():
            table.add_row(
                name,
                precision,
                f"{row['bytes'] / 1e6:.1f}",
                f"{statistics.median(row['psnr']):.1f} dB",
                f"{min(row['psnr']):.1f} dB",
                f"{statistics.median(row['ssim']):.4f}",
            )
    Console().print(table)


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Median PSNR against bytes, a panel for each checkpoint."""
    from matplotlib import pyplot

    checkpoints = report["checkpoints"]
    figure, axes = pyplot.subplots(1, len(checkpoints), figsize=(12, 4.5), squeeze=False)
    for axis, (name, rows) in zip(axes[0], checkpoints.items(), strict=True):
        for precision, row in rows.items():
            ratios = row["psnr"]
            # What is exact to float32's last digit has no ratio that a plot could show.
            low, middle, high = (
                min(value, 100.0) for value in (min(ratios), statistics.median(ratios), max(ratios))
            )
            size = row["bytes"] / 1e6
            spread = [[middle - low], [high - middle]]
            mark = _MARKS[list(rows).index(precision) % len(_MARKS)]
            axis.errorbar(size, middle, spread, fmt=mark, linewidth=0.5, label=precision)
        axis.set_title(name)
        axis.set_xlabel("graphs and weights of the bundle, MB")
        axis.set_ylabel("PSNR against PyTorch float32, dB")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
