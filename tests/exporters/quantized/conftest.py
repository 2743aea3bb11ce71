"""A small checkpoint's transformer in every quantized precision, each exported once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import onnx_ir as ir

from exporters.calibrate.range_file import CalibrationFile, read_calibration, write_calibration
from exporters.calibrate.ranges import ActivationRanges, measure_ranges
from exporters.calibrate.trajectory import Calibration
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.weights.bind import NO_LEDGER, Ledger, WeightFolder
from fluxdeploy.progress import Progress

TEXT = 12
DIGEST = "0" * 64
SHORT = Calibration(
    prompts=("", "a red circle above a blue square on a white background"),
    seed=3,
    sizes=((32, 48),),
    steps=1,
    guidance=2.5,
)

IMAGE_AND_TEXT = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff_context.net.0.proj", "ff_context.net.2"),
)
JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
LINEARS = {f"transformer_blocks.{i}.{name}" for i in range(2) for name in IMAGE_AND_TEXT}
LINEARS |= {f"single_transformer_blocks.{i}.{name}" for i in range(2) for name in JOINT}
"""What is quantized of the checkpoint's two blocks of each kind; `attn.to_q` and so on."""

ATTENTIONS = {
    f"{kind}.{i}.attn"
    for kind in ("transformer_blocks", "single_transformer_blocks")
    for i in range(2)
}

ExportInto = Callable[..., Path]
"""`export_into(folder, precision, compute="fp32", checkpoint=None, ledger=None)`: the ONNX file."""

Quantized = Callable[..., Path]
"""`quantized(precision, compute="fp32")`: the ONNX file, not to be written to."""


@pytest.fixture(scope="session")
def source(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint in diffusers layout, float32, not to be written to."""
    return checkpoint("dev")


def write_ranges(ranges: ActivationRanges, path: Path) -> None:
    """A calibration of ranges alone."""
    write_calibration(CalibrationFile(ranges.checkpoint, ranges, {}), path)


def read_ranges(path: Path, checkpoint: Checkpoint, digest: str | None) -> ActivationRanges:
    found = read_calibration(path, checkpoint, digest).ranges
    assert found is not None
    return found


def open_short(folder: Path) -> Checkpoint:
    """A checkpoint whose text is `TEXT` tokens long, which keeps the tests quick."""
    return dataclasses.replace(open_checkpoint(folder), settings={"max_sequence_length": TEXT})


@pytest.fixture(scope="session")
def opened(source: Path) -> Checkpoint:
    return open_short(source)


@pytest.fixture(scope="session")
def ranges(shared_folder: Any, opened: Checkpoint) -> ActivationRanges:
    def make(folder: Path) -> None:
        folder.mkdir()
        measured = measure_ranges(opened, DIGEST, SHORT, None, Progress(quiet=True))
        write_ranges(measured, folder / "ranges.json")

    return read_ranges(shared_folder.entry("ranges", make) / "ranges.json", opened, DIGEST)


@pytest.fixture(scope="session")
def traced(remembered_traces: Path, opened: Checkpoint) -> Callable[[str], ir.Model]:
    """`traced(compute)`: the transformer's trace, which takes nearly all the time of an export."""
    from tests.support.traces import Traces

    memory = Traces(remembered_traces)

    def load(compute: str) -> ir.Model:
        chain, _ = COMPONENTS["transformer"].source(opened, compute)
        return memory(chain)

    return load


@pytest.fixture(scope="session")
def export_into(
    opened: Checkpoint, ranges: ActivationRanges, traced: Callable[[str], ir.Model]
) -> ExportInto:
    def export(
        folder: Path,
        precision: str,
        compute: str = "fp32",
        checkpoint: Checkpoint = opened,
        ledger: Ledger = NO_LEDGER,
    ) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("exporters.export.trace_chain", lambda chain: traced(compute))
            weights = WeightFolder(folder / "weights")
            spec = specify(checkpoint, COMPONENTS["transformer"], precision, compute)
            if spec.layers is not None:
                spec = spec.with_layers(dataclasses.replace(spec.layers, ranges=ranges))
            exported = export_component(spec, weights, ledger=ledger)
        return folder / exported.path

    return export


@pytest.fixture(scope="session")
def quantized(shared_folder: Any, export_into: ExportInto) -> Quantized:
    def make(precision: str, compute: str = "fp32") -> Path:
        folder = shared_folder.entry(
            f"quantized-{precision}-{compute}",
            lambda target: export_into(target, precision, compute),
        )
        return Path(folder) / "transformer.onnx"

    return make
