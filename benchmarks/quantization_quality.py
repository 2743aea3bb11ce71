"""What quantization does to the default model: pictures and layers against PyTorch float32.

Draws the same prompts from the same seeds with PyTorch in float32 and with a bundle of each
precision, and compares; measures the noise of every quantized layer; and lets
`fluxdeploy.demo.scorer` say how many pictures show what their prompt says.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from engines import Engine, EngineOptions
from fluxdeploy.build.build import build
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import Bundle
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress
from fluxdeploy.similarity import psnr, ssim
from fluxdeploy.text import load_tokenizers
from fluxdeploy.verify.layers import compare_layers
from fluxdeploy.verify.pictures import choose_scenes, draw, judge
from fluxdeploy.verify.reference import ReferenceEngine

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy")
PRECISIONS = ("fp8-weights", "fp8-linears", "fp8", "int8-dynamic")

_ATTENTION = re.compile(r"\.(query|key|value|output)$")


@click.command()
@click.option("--pictures", default=60, show_default=True, help="Prompts, each with its seed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw this PNG (matplotlib).")
def main(pictures: int, json_file: Path | None, plot: Path | None) -> None:
    """Compare the default model in 8 bits with PyTorch float32."""
    machine = describe_machine(PACKAGES)
    checkpoint = find_checkpoint(None)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="quantization-") as place, Progress() as progress:
        expected: Array | None = None
        shown: list[bool | None] = []
        for precision in PRECISIONS:
            bundle = build(
                BuildRequest(precision=precision, runtimes=("onnxruntime",), targets=("cpu",)),
                Path(place) / precision,
                progress,
            )
            drawing = choose_scenes(bundle, pictures)
            if expected is None:
                with _reference(bundle, checkpoint) as pipe:
                    expected = draw(pipe, drawing, "Drawing with PyTorch float32", progress)
                shown = judge(expected, drawing.scenes)
            with FluxPipeline.from_bundle(bundle.root, "onnxruntime", EngineOptions()) as pipe:
                drawn = draw(pipe, drawing, f"Drawing in {precision}", progress)
            layers = compare_layers(bundle, checkpoint, progress)
            assert layers is not None
            results[precision] = {
                "psnr": [psnr(a, b) for a, b in zip(drawn, expected, strict=True)],
                "ssim": [ssim(a, b) for a, b in zip(drawn, expected, strict=True)],
                "objects": statistics.fmean(bool(v) for v in judge(drawn, drawing.scenes)),
                "sqnr": dict(layers.sqnr),
            }
    report = {
        "machine": machine,
        "pictures": pictures,
        "steps": drawing.steps,
        "height": drawing.height,
        "width": drawing.width,
        "objects_in_pytorch": statistics.fmean(bool(value) for value in shown),
        "precisions": results,
    }
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot_report(report, plot)


def _reference(bundle: Bundle, checkpoint: Any) -> FluxPipeline:
    def open_reference(component: str) -> Engine:
        return ReferenceEngine(checkpoint, component)

    return FluxPipeline(bundle, load_tokenizers(bundle), open_reference)


def show(report: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table("precision", title=f"{report['pictures']} pictures against PyTorch float32")
    for heading in ("PSNR, median", "least", "SSIM, median", "least", "worst layer", "objects"):
        table.add_column(heading, justify="right")
    for name, result in report["precisions"].items():
        table.add_row(
            name,
            f"{statistics.median(result['psnr']):.1f} dB",
            f"{min(result['psnr']):.1f} dB",
            f"{statistics.median(result['ssim']):.4f}",
            f"{min(result['ssim']):.4f}",
            f"{min(result['sqnr'].values()):.1f} dB",
            f"{result['objects']:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(f"objects right in PyTorch: {report['objects_in_pytorch']:.1%}")


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """The distributions of PSNR and SSIM, and the noise of every layer."""
    from matplotlib import pyplot

    names: Sequence[str] = list(report["precisions"])
    results = [report["precisions"][name] for name in names]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), width_ratios=(1, 1, 2))
    for axis, what, label in zip(axes, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=False):
        axis.boxplot([result[what] for result in results], tick_labels=names)
        axis.set_ylabel(f"{label}, against PyTorch float32")
        axis.tick_params(axis="x", rotation=30)
    for name, result in zip(names, results, strict=True):
        linears = [ratio for layer, ratio in result["sqnr"].items() if not _ATTENTION.search(layer)]
        axes[2].plot(linears, ".-", label=name, linewidth=0.8)
    axes[2].set_xlabel("quantized linear, in the network's order")
    axes[2].set_ylabel("signal to quantization noise, dB")
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
