"""The benchmark of a step: the weights that it packs, and the table that it prints."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console
from safetensors.torch import load_file

from engines.native.file import read_engine
from engines.native.match import match
from engines.native.pack import write_engine
from fluxdeploy.progress import Progress
from tests.engines.native.conftest import (
    Graphs,
    export_into,
    graphs,
    opened,
    quantized,
    ranges,
    source,
    traced,
)
from tests.support.native_plan import load_tensors

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

__all__ = ["export_into", "graphs", "opened", "quantized", "ranges", "source", "traced"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`script(name)`: one of the benchmarks, which see each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_weights_are_packed_as_a_build_packs_them(
    graphs: Graphs, source: Path, script: Callable[[str], Any], tmp_path: Path
) -> None:
    model = ir.load(graphs("bf16"))
    plan = match(model)
    write_engine(tmp_path / "built", plan, model, {"kernel": b"code"}, {}, Progress(quiet=True))
    written = {
        "plan": plan.to_json(),
        "packed": [asdict(each) for each in plan.packed],
        "metadata": {},
        "cubins": ["kernel"],
    }
    (tmp_path / "bf16.json").write_text(json.dumps(written), encoding="utf-8")
    (tmp_path / "kernel.cubin").write_bytes(b"code")
    state = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    bfloat16 = {name: tensor.bfloat16() for name, tensor in state.items()}
    script("gpu_step_worker")._write_engine(tmp_path, "bf16", bfloat16)
    built, packed = (read_engine(tmp_path / name) for name in ("built", "bf16.engine"))
    assert packed.cubins() == built.cubins() == {"kernel": b"code"}
    expected = load_tensors(built)
    for name, values in load_tensors(packed).items():
        assert np.array_equal(values, expected[name]), name


FOUND = {
    "size": 1024,
    "step_ms": 80.0,
    "p90_ms": 81.0,
    "error": 0.01,
    "joules": 50.0,
    "clock_mhz": 1600,
    "memory": 9e9,
    "throttled": 4,
}


def test_a_gpu_that_is_too_hot_has_no_time(script: Callable[[str], Any]) -> None:
    results = [
        FOUND | {"contender": "eager", "what": "eager", "step_ms": 160.0},
        FOUND | {"contender": "native-fp8", "what": "native, fp8"},
        FOUND | {"contender": "compile", "what": "compile", "throttled": 0x24},
        {"contender": "native-bf16", "what": "512", "failure": "stopped after 3 s"},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(script("gpu_step").table_of(results))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    assert "80.00" in lines[1]
    assert "2.00x" in lines[1]
    assert "slowed down by heat" in lines[2]
    assert "80.00" not in lines[2]
    assert "stopped after 3 s" in lines[3]
