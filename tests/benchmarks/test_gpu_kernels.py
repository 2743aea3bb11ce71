"""The first run on a GPU: what it counts, and that it tells what it could not measure."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_kernels, gpu_kernels_worker
from benchmarks.gpu_kernels import fastest, rate, run_stage, table_of
from benchmarks.gpu_kernels_worker import Contender, Result
from benchmarks.roofline import count_step
from exporters.synthetic.sparse_checkpoint import FLUX_DEV


def test_operations_are_those_that_pytorch_counts() -> None:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        F.linear(torch.empty(7, 48), torch.empty(96, 48))
    assert gpu_kernels_worker.product_operations(7, 48, 96) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        q, k, v = torch.empty(3, 1, 4, 20, 32)
        torch.softmax(q @ k.mT, -1) @ v
    assert gpu_kernels_worker.attention_operations(20, 4 * 32) == counter.get_total_flops()


def test_a_step_has_the_operations_of_the_roofline() -> None:
    config = FLUX_DEV.transformer
    work = count_step(config, 4096, 512)
    found = gpu_kernels_worker.step_operations(
        config.double_blocks, config.single_blocks, 4096, 512
    )
    assert found == work.linears + work.attention


def test_the_products_are_those_of_the_blocks() -> None:
    """Per token: a double block has four of them in each stream, a single block two."""
    config = FLUX_DEV.transformer
    weights = {(i, o): i * o for i, o, _ in gpu_kernels_worker.PRODUCTS}
    d, m = config.width, config.mlp_width
    double = weights[d, 3 * d] + weights[d, d] + weights[d, m] + weights[m, d]
    single = weights[d, 3 * d + m] + weights[d + m, d]
    assert double == single == 4 * d * d + 2 * d * m


def test_the_stages_are_those_of_the_worker_and_end_within_six_minutes() -> None:
    assert list(gpu_kernels.STAGES) == list(gpu_kernels_worker.STAGES)
    (seconds,) = [o.default for o in gpu_kernels.main.params if o.name == "seconds"]
    assert seconds < 360


def test_a_rate_is_in_operations_a_second() -> None:
    assert rate({"milliseconds": 2.0, "operations": 4 * 10**9}) == 2e12
    assert rate({"milliseconds": None, "operations": None, "failure": "no"}) is None


RESULTS = [
    {"stage": "linears", "what": "ours", "shape": "8x8", "variant": "a", "failure": "too large"},
    {
        "stage": "linears",
        "what": "ours",
        "shape": "8x8",
        "variant": "b",
        "milliseconds": 0.5,
        "operations": 10**9,
        "error": 0.004,
    },
    {
        "stage": "linears",
        "what": "ours",
        "shape": "8x8",
        "variant": "c",
        "milliseconds": 0.25,
        "operations": 10**9,
        "error": 0.004,
    },
    {"stage": "linears", "what": "ours", "shape": "9x9", "variant": "a", "failure": "first"},
    {"stage": "linears", "what": "ours", "shape": "9x9", "variant": "b", "failure": "second"},
]


def test_the_table_has_the_fastest_of_several_ways_and_why_there_is_none() -> None:
    assert [found["variant"] for found in fastest(RESULTS)] == ["c", "a"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table_of(RESULTS))
    rows = [line.split() for line in console.export_text().splitlines() if "ours" in line]
    cells = [[cell for cell in row if cell != "│"] for row in rows]
    assert cells == [["ours", "8x8", "c", "0.250", "4.0", "4.0e-03"], ["ours", "9x9", "a", "first"]]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code, "stage"]


def test_a_result_is_there_as_soon_as_it_is_printed() -> None:
    code = """
import time
print("a library says hello")
print("{'a': 'dictionary'}")
print(3)
print('{"what": "one"}', flush=True)
time.sleep(60)
"""
    lines = run_stage(python(code), 30, "stage")
    started = time.monotonic()
    assert next(lines) == {"what": "one"}
    lines.close()
    assert time.monotonic() - started < 20


def test_a_stage_that_hangs_is_stopped_with_its_children() -> None:
    code = """
import subprocess, sys, time
print('{"what": "one"}', flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"what": "ha', end="", flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    one, last = run_stage(python(code), 3, "stage")
    assert one == {"what": "one"}
    assert last == {"what": "stage", "failure": "stopped after 3 s"}
    assert time.monotonic() - started < 20


def test_a_stage_that_breaks_tells_its_last_words() -> None:
    one, last = run_stage(python("print('{}'); raise SystemExit('a kernel faulted')"), 30, "stage")
    assert one == {}
    failure = "ended with code 1; its last words: a kernel faulted"
    assert last == {"what": "stage", "failure": failure}


def test_a_stage_without_time_is_not_started() -> None:
    assert list(run_stage(["no such program", "stage"], 0.5, "stage")) == [
        {"what": "stage", "failure": "no time was left"}
    ]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = CliRunner().invoke(gpu_kernels.main, [])
    assert found.exit_code == 1
    assert (
        found.output == "Error: PyTorch finds no NVIDIA GPU here, and nothing else is measured.\n"
    )


def test_the_file_has_what_was_found_until_a_stage_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        """
import json, sys
if sys.argv[1] == "machine":
    print(json.dumps({"machine": {"gpu": "a GPU"}}))
elif sys.argv[1] == "peaks":
    print(json.dumps({"what": "bf16", "milliseconds": 1.0, "operations": 10**12}), flush=True)
    sys.exit("out of memory")
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu_kernels, "WORKER", worker)
    monkeypatch.setattr(gpu_kernels, "has_gpu", lambda: True)
    file = tmp_path / "found.json"
    stages = [f"--stage={stage}" for stage in ("machine", "peaks", "eager")]
    ran = CliRunner().invoke(gpu_kernels.main, [f"--json={file}", *stages])
    assert ran.exit_code == 0
    assert "1000.0" in ran.output
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["machine"] == {"gpu": "a GPU"}
    assert [(each["stage"], each["what"]) for each in written["results"]] == [
        ("peaks", "bf16"),
        ("peaks", "peaks"),
    ]
    assert "out of memory" in written["results"][1]["failure"]
    assert list(written["seconds"]) == ["machine", "peaks", "eager"]


def test_a_way_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def contender(name: str, result: torch.Tensor) -> Contender:
        return Contender(lambda: calls.append(name), lambda: result)

    def absent() -> Contender:
        raise ImportError("No module named 'cudnn'\nand more")

    def elapsed(run: object, repeats: int) -> float:
        contenders[["right", "near"][run is contenders["near"].run]].run()
        return 2.0 if run is contenders["right"].run else 4.0

    ones = torch.ones(4, 2)
    contenders = {
        "right": contender("right", ones),
        "near": contender("near", ones * 0.875),
        "broken": contender("broken", ones * torch.nan),
        "wrong": contender("wrong", ones / 2),
    }
    builds = {name: lambda each=each: each for name, each in contenders.items()}
    monkeypatch.setattr(gpu_kernels_worker, "_elapsed", elapsed)
    found = gpu_kernels_worker._measure(
        "x", "4x2", 80, builds | {"absent": absent}, torch.ones(3, 2), 0.1, rounds=3
    )
    by_variant = {result.variant: result for result in found}
    assert by_variant["right"] == Result("x", "4x2", "right", 2.0, 80, 0.0)
    assert by_variant["near"] == Result("x", "4x2", "near", 4.0, 80, 0.125)
    assert by_variant["broken"].failure == "ArithmeticError: its error is not finite"
    assert by_variant["wrong"].failure == "ArithmeticError: its error is 0.5"
    assert by_variant["absent"].failure == "ImportError: No module named 'cudnn'"
    assert calls[-6:] == ["right", "near"] * 3


def test_a_stage_that_fails_is_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage() -> object:
        yield Result("one", milliseconds=1.0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(gpu_kernels_worker, "STAGES", {"attention": stage})
    gpu_kernels_worker.main("attention")
    one, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["what"], one["milliseconds"]) == ("one", 1.0)
    assert last["what"] == "attention"
    assert last["failure"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
