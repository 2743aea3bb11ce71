"""`fluxdeploy bench` from the outside: real contenders, and what is refused before they start."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import fluxdeploy.bench.measure
from engines import EngineOptions
from fluxdeploy.bench import bundle_contender, choose
from fluxdeploy.bench.clock import Laps
from fluxdeploy.bench.job import PEERS, Job
from fluxdeploy.bench.measure import Contender
from fluxdeploy.bench.process import ContenderProcess
from fluxdeploy.bench.report.record import BenchReport, from_json
from fluxdeploy.bench.stopwatch import Stopwatch
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import MANIFEST_NAME
from fluxdeploy.cli import main
from fluxdeploy.errors import EngineError

ROOT = Path(__file__).parents[2]

QUICK = ("--rounds", 1, "--warmup", 0, "--steps", 2, "--threads", 1)
SMALL = (*QUICK, "--size", "48x32")


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "150"}).invoke(main, ["bench", *map(str, arguments)])


def measure(*arguments: object) -> BenchReport:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return from_json(result.stdout)


def test_a_bundle_is_timed_in_all_its_parts(demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, plot = tmp_path / "bench.html", tmp_path / "bench.png"
    files = ("--html", page, "--plot", plot)
    arguments = ("--bundle", demo_bundle, *QUICK, "--size", "96x64", "--batch", 2)
    report = measure(*arguments, "--cold-starts", 1, *files)
    (contender,) = report.contenders
    assert report.baseline == contender.name == str(demo_bundle)
    assert (report.workload.width, report.workload.height, report.workload.batch) == (96, 64, 2)
    counts = {name: timing.count for name, timing in contender.timings.items()}
    assert counts == {
        "picture": 1,
        "step": 2,
        "transformer": 2,
        "host": 2,
        "clip": 1,
        "t5": 1,
        "conditioner": 1,
        "vae_decoder": 1,
        "cold start": 1,
    }
    parts = contender.parts(report.workload.steps)
    assert sum(parts.values()) >= contender.timings["picture"].p50
    assert all(value >= 0 for value in parts.values())
    assert 0 < contender.timings["host"].p50 < contender.timings["step"].p50
    assert contender.load > 0
    assert contender.memory is None or contender.memory > 50 << 20
    assert contender.timings["picture"].ratio is not None
    assert contender.timings["picture"].ratio.median == 1.0
    assert set(report.noise) == set(counts) - {"cold start"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.html", "bench.png"]


@pytest.mark.parametrize("peer", ["eager", "openvino"])
def test_peers_draw_what_the_bundle_draws(demo_bundle: Path, peer: str) -> None:
    for module, _ in PEERS[peer].packages:
        pytest.importorskip(module)
    arguments = ("--bundle", demo_bundle, "--against", peer, *SMALL, "--cold-starts", 0)
    report = measure(*arguments)
    own, other = report.contenders
    assert report.baseline == other.name == peer
    assert other.agreement.velocity_error < 2e-5
    assert other.agreement.psnr is None or other.agreement.psnr > 60
    assert "conditioner" not in other.timings
    for name in ("picture", "step", "transformer", "clip", "t5", "vae_decoder"):
        assert own.timings[name].ratio is not None
        assert other.timings[name].count == own.timings[name].count


@pytest.mark.parametrize("one_by_one", [True, False])
def test_one_by_one_no_two_contenders_are_in_memory(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_by_one: bool
) -> None:
    running: list[str] = []
    most = 0

    class Counted(ContenderProcess):
        def __init__(self, name: str, job: Job) -> None:
            nonlocal most
            super().__init__(name, job)
            running.append(name)
            most = max(most, len(running))

        def close(self) -> None:
            running.remove(self._name)
            super().close()

    monkeypatch.setattr(fluxdeploy.bench.measure, "ContenderProcess", Counted)
    copy = shutil.copytree(demo_bundle, tmp_path / "copy")
    arguments = ("--bundle", demo_bundle, "--bundle", copy, *SMALL, "--cold-starts", 0)
    flags = ("--one-by-one",) if one_by_one else ()
    report = measure(*arguments, *flags)
    assert report.one_by_one is one_by_one
    assert most == (1 if one_by_one else 2)
    assert not running
    for contender in report.contenders:
        assert contender.timings["step"].count == 2
        assert contender.timings["step"].ratio is not None
        assert contender.agreement.velocity_error == 0


def test_a_peer_for_cpus_is_refused_beside_a_bundle_for_gpus(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    engine = choose._engine
    monkeypatch.setattr(choose, "_engine", lambda *given: replace(engine(*given), target="cuda"))
    result = run("--bundle", demo_bundle, "--against", "openvino-bf16", *SMALL)
    assert result.exit_code == 2
    assert "The peer openvino-bf16 runs on the CPU" in result.stderr


def test_the_gpu_that_is_asked_for_reaches_every_engine(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Job] = []

    def stop(contenders: list[Contender], *others: object) -> None:
        found.extend(contender.job for contender in contenders)
        raise EngineError("enough")

    monkeypatch.setattr(fluxdeploy.bench.measure, "run_bench", stop)
    assert "enough" in run("--bundle", demo_bundle, "--device", 2, *SMALL).stderr
    (job,) = found
    opened: list[EngineOptions] = []
    monkeypatch.setattr(
        bundle_contender, "open_engine", lambda *given: opened.append(given[3]) or object()
    )
    monkeypatch.setattr(bundle_contender, "TimedEngine", lambda *given: None)
    contender = bundle_contender.BundleContender(job, Stopwatch())
    contender._opener(open_bundle(demo_bundle))("clip")
    assert opened == [EngineOptions(threads=1, device=2)]


def test_another_network_is_not_timed(
    demo_bundle: Path, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(
        *("--bundle", demo_bundle, "--bundle", bundle("dev"), *SMALL),
        *("--html", tmp_path / "bench.html"),
    )
    assert result.exit_code == 1
    assert "draws something else than" in result.stderr
    assert "Nothing was timed" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_torch(tmp_path: Path) -> Iterator[Path]:
    """A folder for PYTHONPATH in which importing what only peers need fails."""
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("torch", "transformers", "diffusers", "onnx", "onnx_ir"):
        (folder / f"{name}.py").write_text("raise ImportError('not here')\n")
    yield folder
    shutil.rmtree(folder)


def start(*arguments: object, cwd: Path, path: Path | None = None) -> subprocess.Popen[str]:
    paths = [str(ROOT), *([] if path is None else [str(path)])]
    return subprocess.Popen(
        [sys.executable, "-m", "fluxdeploy", "bench", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests run as a shell's background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_bundles_are_timed_without_torch(
    demo_bundle: Path, without_torch: Path, tmp_path: Path
) -> None:
    arguments = ("--bundle", demo_bundle, *QUICK, "--size", "96x96", "--cold-starts", 0)
    with start(*arguments, cwd=tmp_path, path=without_torch) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "A picture of 96x96 in 2 steps" in output


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="it looks for processes in /proc")
def test_ctrl_c_before_the_first_round_leaves_no_file_and_no_process(
    demo_bundle: Path, tmp_path: Path
) -> None:
    files = ("--json", "--html", "bench.html")
    arguments = ("--bundle", demo_bundle, *QUICK, "--warmup", 10_000, *files)
    with start(*arguments, cwd=tmp_path) as process:
        children = wait_for(lambda: children_of(process.pid))
        process.send_signal(signal.SIGINT)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert output == ""
    assert list(tmp_path.iterdir()) == []
    # Whose parent has gone is taken away by another process, when that gets to it.
    for _ in range(100):
        left = [child for child in children if Path(f"/proc/{child}").exists()]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def wait_for(find: Callable[[], list[int]]) -> list[int]:
    for _ in range(600):
        if found := find():
            return found
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def children_of(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:  # it has ended
            continue
        if re.search(rf"^PPid:\t{parent}$", text, re.MULTILINE):
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("stage", ["rounds", "cold starts"])
def test_ctrl_c_keeps_what_was_finished(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of the rounds the whole ones, and no cold starts; of the cold starts none, and all rounds."""

    class Interrupted(ContenderProcess):
        draws = starts = 0

        def __init__(self, name: str, job: Job) -> None:
            type(self).starts += 1
            if stage == "cold starts" and self.starts > 1:
                raise KeyboardInterrupt
            super().__init__(name, job)

        def draw(self) -> Laps:
            type(self).draws += 1
            # A round is two draws here: the contender's, and the baseline's own again.
            if stage == "rounds" and self.draws == 6:
                raise KeyboardInterrupt
            return super().draw()

    monkeypatch.setattr(fluxdeploy.bench.measure, "ContenderProcess", Interrupted)
    page = tmp_path / "bench.html"
    counts = ("--rounds", 4, "--warmup", 0, "--cold-starts", 2)
    arguments = ("--bundle", demo_bundle, *SMALL, *counts, "--html", page, "--json")
    result = run(*arguments)
    assert result.exit_code == 130
    report = from_json(result.stdout)
    assert report.rounds == (2 if stage == "rounds" else 4)
    assert report.cold_starts == 0
    assert len(report.contenders[0].timings["picture"].rounds) == report.rounds
    assert f"Interrupted after {report.rounds} of 4 rounds and 0 of 2 cold starts" in result.stderr
    assert f"{report.rounds} rounds after" in page.read_text()


def test_an_unknown_peer_is_told_the_known_ones(demo_bundle: Path) -> None:
    result = run("--bundle", demo_bundle, "--against", "eager,tensorflow")
    assert result.exit_code == 2
    assert "no peer tensorflow" in result.stderr
    for name in PEERS:
        assert name in result.stderr


def test_a_missing_package_is_named_with_its_command(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run("--bundle", demo_bundle, "--against", "eager")
    assert result.exit_code == 1
    assert "pip install diffusers" in result.stderr


def test_a_bundle_of_an_unnamed_checkpoint_needs_it(bundle: Callable[..., Path]) -> None:
    result = run("--bundle", bundle("dev"), "--against", "eager")
    assert result.exit_code == 2
    assert "and need --checkpoint" in result.stderr


def test_another_checkpoint_is_refused(
    bundle: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    arguments = ("--bundle", bundle("dev"), "--against", "eager")
    result = run(*arguments, "--checkpoint", checkpoint("constant"))
    assert result.exit_code == 2
    assert "is not the checkpoint" in result.stderr
    result = run(*arguments, "--checkpoint", checkpoint("dev", "bfl"))
    assert result.exit_code == 2
    assert "its weights or its layout differ" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "100x96"), "multiples of 16"),
        (("--size", "big"), "WIDTHxHEIGHT"),
        (("--runtime", "tensorrt"), "no engine for --runtime tensorrt"),
        (("--html", "missing/bench.html"), "a folder that exists"),
        (("--rounds", "0"), "--rounds"),
        (("--against", ""), "The peers are"),
    ],
)
def test_wrong_usage_is_refused_before_the_work(
    arguments: tuple[str, str], words: str, demo_bundle: Path
) -> None:
    result = run("--bundle", demo_bundle, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    result = run("--bundle", tmp_path / "nothing")
    assert result.exit_code == 1
    assert MANIFEST_NAME in result.stderr
