"""An engine's launches, run over host memory: they must give what the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.base import EngineOptions
from engines.native.file import read_engine
from engines.native.match import match
from engines.native.pack import write_engine
from engines.native.plan import BYTES, Plan
from engines.native.run import NativeEngine
from engines.native.specs import Kernel, KernelSpec, TensorBox
from engines.native.tiles import _TILES, FEW_ROWS, Tile
from engines.native.works import schedule, works_metadata
from exporters.calibrate.ranges import measure_ranges
from exporters.components.registry import COMPONENTS
from exporters.export import export_component, specify
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, TensorSpec
from fluxdeploy.progress import Progress
from tests.engines.native.conftest import Graphs
from tests.engines.native.fake_gpu import FakeCudnn, FakeGpu
from tests.engines.native.test_match import distance, make_inputs
from tests.exporters.quantized.conftest import SHORT, open_short
from tests.support.checkpoints import Shape, make_checkpoint
from tests.support.native_plan import load_tensors, run_plan


def kernel_of(spec: KernelSpec) -> Kernel:
    """What the compiler would tell, as far as launches need it."""
    boxes = tuple(
        TensorBox(rows, min(columns, 128 // BYTES[spec.types[name]]), 3)
        for name, (rows, columns) in (spec.boxes or {}).items()
    )
    tile = int(spec.constants.get("TILE_ROWS", 1)), int(spec.constants.get("TILE_COLUMNS", 1))
    return Kernel(spec.name, spec.function, "entry", 128, 0, boxes, tile, spec.programs)


@dataclass
class Opened:
    """An engine on a `FakeGpu`, and the tensors of its file."""

    engine: NativeEngine
    gpu: FakeGpu
    tensors: Mapping[str, Any]
    specs: list[KernelSpec]

    def expected(self, inputs: Mapping[str, Any]) -> Any:
        return run_plan(self.engine.plan, self.tensors, inputs)


def opened(path: Path, folder: Path) -> AbstractContextManager[Opened]:
    """The engine of a graph."""
    model = ir.load(path)
    return open_plan(match(model), model, folder)


@contextmanager
def open_plan(plan: Plan, model: ir.Model, folder: Path) -> Iterator[Opened]:
    """The engine of a plan with a graph's weights. What it leaves on the GPU is seen."""
    specs = [spec for work in schedule(plan) for spec in work.specs]
    kernels = {spec.name: kernel_of(spec) for spec in specs}
    cubins = {name: name.encode() for name in kernels}
    file = folder / "transformer.engine"
    write_engine(file, plan, model, cubins, works_metadata(plan, kernels), Progress(quiet=True))
    gpu = FakeGpu({spec.name.encode(): spec for spec in specs})
    width = plan.width
    floats = partial(TensorSpec, dtype="float32")
    channels = [plan.buffer(name).columns for name in ("hidden_states", "velocity")]
    record = ComponentRecord(
        key="",
        precision="bf16",
        compute="bf16",
        inputs=(
            floats("hidden_states", shape=("B", "L", channels[0])),
            floats("context", shape=("B", "S", width)),
            floats("modulation", shape=("B", plan.modulation_rows, width)),
            floats("rope_cos", shape=("T", plan.head_dim)),
            floats("rope_sin", shape=("T", plan.head_dim)),
        ),
        outputs=(floats("velocity", shape=("B", "L", channels[1])),),
        files=(),
        engines=(),
        golden=None,
    )
    engine = EngineRecord("native", "2", "sm90", file.name, {})
    read = read_engine(file)
    with NativeEngine(
        "transformer",
        record,
        engine,
        read,
        gpu,
        partial(FakeCudnn, gpu),  # type: ignore[arg-type]
        EngineOptions(),
    ) as native:
        yield Opened(native, gpu, load_tensors(read), specs)
    assert not gpu.device
    assert not gpu.streams
    assert not gpu.modules
    assert not gpu.graphs
    assert not gpu.handles


def batch(pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of several pictures; the tables are one picture's."""
    return {
        name: values if name.startswith("rope") else np.stack([each[name] for each in pictures])
        for name, values in pictures[0].items()
    }


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8-linears", "linears", "attentions"])
def test_launches_give_what_the_plan_says(graphs: Graphs, tmp_path: Path, name: str) -> None:
    """Two pictures, then other sizes, then the first ones from their recording."""
    with opened(graphs(name), tmp_path) as run:
        for text, image in ((128, 40), (7, 5), (7, 5)):
            pictures = [make_inputs(run.engine.plan, text, image) for _ in range(2)]
            pictures[1]["hidden_states"] = pictures[1]["hidden_states"][::-1].copy()
            pictures[1]["modulation"] = -pictures[1]["modulation"]
            found = run.engine.run(batch(pictures))["velocity"]
            for index, each in enumerate(pictures):
                assert distance(found[index], run.expected(each)) < 1e-2
        assert run.gpu.calls["launch_graph"] == 2


def test_norms_and_rope_follow_their_product_in_one_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where heads are 128 wide, as FLUX.1's, and one product makes an MLP's input too.

    Products of few tiles share them out, which those of so few channels would not do by themselves.
    """
    tile = Tile(128, 256, 4, 4, form="shared")
    monkeypatch.setitem(_TILES, ("fp8", "residual", False), (tile, tile))
    shape = Shape("wide", head_dim=128, heads=2, axes_dims=(16, 56, 56), double=1, single=1)
    checkpoint = open_short(make_checkpoint(tmp_path / "wide", shape))
    spec = specify(checkpoint, COMPONENTS["transformer"], "fp8", "bf16")
    assert spec.layers is not None
    ranges = measure_ranges(checkpoint, "", SHORT, None, Progress(quiet=True))
    layers = replace(spec.layers, ranges=ranges)
    exported = export_component(spec.with_layers(layers), WeightFolder(tmp_path / "weights"))
    with opened(tmp_path / exported.path, tmp_path) as run:
        assert len([spec for spec in run.specs if spec.constants.get("TURN")]) == 1
        for text, image in ((128, 9), (6, 20), (128, FEW_ROWS)):
            inputs = make_inputs(run.engine.plan, text, image)
            found = run.engine.run(batch([inputs]))["velocity"][0]
            assert distance(found, run.expected(inputs)) < 0.05
        assert run.gpu.shared_out
