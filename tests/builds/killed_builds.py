"""Builds that die: forked from a process that has imported all and remembers the tracing.

`python -m tests.builds.killed_builds TRACES WORK KILLS CHECKPOINT CHECKPOINT` builds the two
checkpoints in turn at one place and kills the build at random moments. After every kill the place
must hold a whole bundle, the earlier one or the new one, and the builds that follow must end with
the bundle of a build that nobody disturbed, byte for byte. Before, a few builds are interrupted as
Ctrl-C does. Prints, as JSON, how the interrupted builds ended and how many kills fell into each
phase.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines.onnxruntime
import exporters.check.golden
import exporters.export
import exporters.synthetic.sparse_checkpoint
import fluxdeploy.build.build
import fluxdeploy.build.engines
import fluxdeploy.build.prepare
import fluxdeploy.build.run
import fluxdeploy.cli.build
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from tests.builds.conftest import tree
from tests.support.traces import Traces

_STEPS: tuple[tuple[Any, str, str], ...] = (
    (Staging, "__enter__", "recovery"),
    (fluxdeploy.build.prepare, "find_checkpoint", "checkpoint"),
    (fluxdeploy.build.run, "hash_checkpoint", "hashing"),
    (fluxdeploy.build.build, "make_tokenizer", "tokenizer"),
    (fluxdeploy.build.prepare, "resolve", "modules"),
    (exporters.export, "trace_chain", "tracing"),
    (exporters.export, "bind", "weights"),
    (exporters.export, "_check", "graph check"),
    (exporters.check.golden, "write_golden", "reference"),
    (engines.onnxruntime, "_session", "engine"),
    (fluxdeploy.build.engines, "measure_component", "gate"),
    (Staging, "record", "record"),
    (Staging, "_check_whole", "check"),
    (Staging, "_swap", "swap"),
)


class Child:
    """`fluxdeploy` with `arguments` in a forked process, which tells of each phase it enters."""

    def __init__(self, *arguments: str, errors: Path = Path(os.devnull)) -> None:
        self.phase = "start"
        self._unread = b""
        self._pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _run(arguments, writer, errors)
        os.close(writer)

    def wait(self) -> int:
        """The exit code, or the signal that ended the process as a negative number."""
        for _ in self.phases():
            pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(status)

    def phases(self) -> Iterator[str]:
        """Each phase as it begins."""
        while data := os.read(self._pipe, 4096):
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                self.phase = line.decode()
                yield self.phase


def _run(arguments: tuple[str, ...], pipe: int, errors: Path) -> None:
    code: Any = 70
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stream = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        for owner, name, phase in _STEPS:
            setattr(owner, name, _announced(getattr(owner, name), phase, pipe))
        main(arguments, prog_name="fluxdeploy")
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


BUILD = ("build", "--runtime", "onnxruntime")
"""Where the processor makes no difference."""

_outer = ["build"]


def _announced(function: Callable[..., Any], phase: str, pipe: int) -> Callable[..., Any]:
    @contextmanager
    def announce() -> Iterator[None]:
        _outer.append(phase)
        os.write(pipe, f"{phase}\n".encode())
        try:
            yield
        finally:
            _outer.pop()
            os.write(pipe, f"{_outer[-1]}\n".encode())

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with announce():
            return function(*args, **kwargs)

    return wrapper


def kill_builds(
    work: Path, kills: int, checkpoints: tuple[str, str]
) -> dict[str, collections.Counter[str]]:
    """Kill builds `kills` times; how many kills fell into each phase, at random and aimed."""
    expected, durations = [], []
    for number, checkpoint in enumerate(checkpoints):
        undisturbed = work / f"undisturbed-{number}"
        started = time.monotonic()
        assert Child(*BUILD, checkpoint, "--out", str(undisturbed)).wait() == 0
        durations.append(time.monotonic() - started)
        expected.append(tree(undisturbed))
    assert expected[0].keys() == expected[1].keys()
    assert expected[0] != expected[1]
    moment = random.Random(5)
    hits: dict[str, collections.Counter[str]] = {
        "random": collections.Counter(),
        "aimed": collections.Counter({phase: 0 for _, _, phase in _STEPS}),
    }
    place = work / "place" / "bundle"
    version, done = 0, 0
    while done < kills:
        child = Child(*BUILD, checkpoints[version], "--out", str(place))
        # Mostly soon after the beginning of a phase, since many are short, else at any time at all.
        if done % 7 in (2, 5):
            kind = "random"
            # Most builds go on where an earlier one was killed, and are shorter than a whole one.
            time.sleep(moment.uniform(0, 0.7 * durations[version]))
        else:
            kind = "aimed"
            fewest = min(hits["aimed"].values())
            wanted = [phase for phase, count in hits["aimed"].items() if count == fewest]
            for phase in child.phases():
                if phase in wanted:
                    time.sleep(moment.uniform(0, 0.003))
                    break
        os.kill(child.pid, signal.SIGKILL)
        ended = child.wait()
        if ended == 0:
            assert tree(place) == expected[version]
            version = 1 - version
            continue
        assert ended == -signal.SIGKILL
        done += 1
        hits[kind][child.phase] += 1
        if place.exists():
            open_bundle(place, check="all")
            assert tree(place) in expected
    for number, checkpoint in enumerate(checkpoints):
        assert Child(*BUILD, checkpoint, "--out", str(place)).wait() == 0
        assert tree(place) == expected[number]
    assert os.listdir(place.parent) == ["bundle"]
    return hits


def interrupt_builds(work: Path, checkpoint: str) -> list[tuple[str, int, str]]:
    """Phase, exit code and output of builds that get SIGINT."""
    endings = []
    for phase in ("hashing", "tracing", "reference", "gate", "record"):
        errors = work / f"interrupted in {phase}"
        place = work / "interrupted" / "bundle"
        child = Child(*BUILD, checkpoint, "--out", str(place), errors=errors)
        for entered in child.phases():
            if entered == phase:
                break
        os.kill(child.pid, signal.SIGINT)
        endings.append((phase, child.wait(), errors.read_text(encoding="utf-8")))
        assert not place.exists()
    return endings


if __name__ == "__main__":
    traces, work, kills, *sources = sys.argv[1:]
    exporters.export.trace_chain = Traces(Path(traces))
    report = {
        "interrupted": interrupt_builds(Path(work), sources[0]),
        "killed": kill_builds(Path(work), int(kills), (sources[0], sources[1])),
    }
    print(json.dumps(report))
