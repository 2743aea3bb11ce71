"""A benchmark: contenders are started, compared with each other, and then timed in turns."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxdeploy import __version__
from fluxdeploy.bench.clock import Laps, Ratio, Run, Timing, make_timing, race
from fluxdeploy.bench.gpu import GpuMeter, open_meter
from fluxdeploy.bench.job import Job
from fluxdeploy.bench.process import ContenderProcess
from fluxdeploy.bench.report.record import (
    QUANTITIES,
    Agreement,
    BenchReport,
    ContenderReport,
    Workload,
)
from fluxdeploy.bench.worker import PICTURES, VELOCITY
from fluxdeploy.errors import NumericError
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress
from fluxdeploy.similarity import psnr

__all__ = ["Contender", "Counts", "run_bench"]

_TWIN = "the baseline again"
_SAME = Agreement(0.0, None)

_GATES = {"fp32": (1e-3, 40.0), "other": (0.25, 15.0)}
"""The largest error of a velocity and the smallest PSNR of a picture, in dB, between contenders of
which both compute in float32, and others. Sampling magnifies roundings: the first figure says that
the networks are the same, the second that the sampling is."""


@dataclass(frozen=True)
class Contender:
    """What is to be timed: its name in the report, how it is described, and its job.

    versions: those of the packages that it runs on.
    """

    name: str
    title: str
    precision: str
    versions: Mapping[str, str]
    job: Job


@dataclass(frozen=True)
class Counts:
    """How often: timed rounds, rounds before them, and starts of a new process.

    one_by_one: a process for each turn, so that no two contenders are in memory at once. Its first
    picture warms it up, and there are no other rounds for that.
    """

    rounds: int
    warmup: int
    cold_starts: int
    one_by_one: bool = False


_Take = Callable[[Contender], AbstractContextManager[ContenderProcess]]
"""Gives a contender's process for a while."""


@dataclass
class _Measured:
    """What is known of a contender so far."""

    memory: int | None = None
    gpu_memory: int | None = None
    loads: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    agreement: Agreement = _SAME


def run_bench(
    contenders: Sequence[Contender],
    baseline: str,
    noise: NDArray[np.float32],
    counts: Counts,
    progress: Progress,
) -> BenchReport:
    """Compare the contenders' outputs with the first one's, then time all of them.

    noise: float32 [B, L, C], packed: what every picture begins with. Ctrl-C ends it early: the
    report then has the rounds and cold starts that were finished. Raises `NumericError` for a
    contender that draws something else, `EngineError` for one that fails, and `KeyboardInterrupt`
    where no round was finished.
    """
    meter = open_meter(contenders[0].job.gpu) if contenders[0].job.device != "cpu" else None
    measured = {contender.name: _Measured() for contender in contenders}
    warmup = 0 if counts.one_by_one else counts.warmup
    laps: dict[str, list[Laps]] = {}
    with tempfile.TemporaryDirectory(prefix="fluxdeploy-bench-") as place:
        placed = [_place(each, Path(place), number) for number, each in enumerate(contenders)]
        np.save(Path(place) / "latents.npy", noise)
        with ExitStack() as opened:
            if counts.one_by_one:
                take = _starter(measured, meter)
            else:
                take = _keeper(_start(placed, measured, meter, opened, progress))
            _compare(placed, take, measured, progress)
            runs = {each.name: _run(each, take, measured[each.name], meter) for each in placed}
            # In the middle of the round, where no other contender is always its neighbour's.
            order = [each.name for each in contenders]
            order.insert((len(order) + 1) // 2, _TWIN)
            again = next(each for each in placed if each.name == baseline)
            runs[_TWIN] = _run(again, take, _Measured(), None)
            task = progress.task("Timing", total=len(runs) * (warmup + counts.rounds))
            laps = race({n: runs[n] for n in order}, counts.rounds, warmup, task.advance)
        rounds = len(laps[baseline])
        cold_starts = counts.cold_starts if rounds == counts.rounds else 0
        starts = _race_starts(placed, measured, cold_starts, progress)
    timings = {each.name: _timings(each.name, baseline, laps, starts) for each in contenders}
    return BenchReport(
        fluxdeploy=__version__,
        machine=_describe(contenders, meter),
        workload=_workload(contenders[0].job),
        baseline=baseline,
        rounds=rounds,
        warmup=warmup,
        cold_starts=len(starts[baseline]),
        one_by_one=counts.one_by_one,
        noise=_noise(laps, baseline),
        contenders=tuple(
            _report(each, measured[each.name], timings[each.name]) for each in contenders
        ),
    )


def _place(contender: Contender, root: Path, number: int) -> Contender:
    """The contender with a folder of its own below `root`."""
    folder = root / str(number)
    folder.mkdir()
    job = replace(contender.job, folder=str(folder), latents=str(root / "latents.npy"))
    return replace(contender, job=job)


def _start(
    contenders: Sequence[Contender],
    measured: Mapping[str, _Measured],
    meter: GpuMeter | None,
    opened: ExitStack,
    progress: Progress,
) -> dict[str, ContenderProcess]:
    """Start all contenders, one after the other: a GPU tells what all processes hold together."""
    task = progress.task("Starting contenders", total=len(contenders))
    take = _starter(measured, meter)
    processes = {}
    for each in contenders:
        processes[each.name] = opened.enter_context(take(each))
        task.advance()
    return processes


def _starter(measured: Mapping[str, _Measured], meter: GpuMeter | None) -> _Take:
    """What starts a contender for as long as it is used."""

    @contextmanager
    def take(each: Contender) -> Iterator[ContenderProcess]:
        own = measured[each.name]
        before = meter.memory() if meter is not None else None
        with ContenderProcess(each.name, each.job) as process:
            after = meter.memory() if meter is not None else None
            if before is not None and after is not None:
                own.gpu_memory = after - before
            own.loads.append(process.load)
            yield process

    return take


def _keeper(processes: Mapping[str, ContenderProcess]) -> _Take:
    """What hands out contenders that are there."""
    return lambda each: nullcontext(processes[each.name])


def _compare(
    contenders: Sequence[Contender],
    take: _Take,
    measured: Mapping[str, _Measured],
    progress: Progress,
) -> None:
    """Hold every contender's first picture against the first contender's."""
    task = progress.task("Comparing pictures", total=len(contenders))
    for each in contenders:
        with take(each) as process:
            process.keep()
        task.advance()
    first = contenders[0]
    for each in contenders[1:]:
        agreement = _agreement(Path(each.job.folder), Path(first.job.folder))
        exact = each.precision == first.precision == "fp32"
        max_error, min_psnr = _GATES["fp32" if exact else "other"]
        ratio = math.inf if agreement.psnr is None else agreement.psnr
        # Written so that NaN fails.
        if not (agreement.velocity_error <= max_error and ratio >= min_psnr):
            raise NumericError(
                f"{each.name} draws something else than {first.name}: its first step is off by "
                f"{agreement.velocity_error:.2g} of its size (at most {max_error:g}), and its "
                f"picture has a PSNR of {ratio:.1f} dB (at least {min_psnr:g}). "
                "Nothing was timed; compare contenders of the same checkpoint."
            )
        measured[each.name].agreement = agreement


def _agreement(own: Path, reference: Path) -> Agreement:
    velocity, expected = (np.load(folder / VELOCITY) for folder in (own, reference))
    error = np.linalg.norm(velocity - expected) / np.linalg.norm(expected)
    pictures, drawn = (np.load(folder / PICTURES) / 255.0 for folder in (own, reference))
    # The pictures of a batch as one, below each other.
    ratio = psnr(pictures.reshape(-1, *pictures.shape[2:]), drawn.reshape(-1, *drawn.shape[2:]))
    return Agreement(float(error), None if np.isinf(ratio) else ratio)


def _run(each: Contender, take: _Take, own: _Measured, meter: GpuMeter | None) -> Run:
    def run() -> Laps:
        with take(each) as process:
            before = meter.energy() if meter is not None else None
            laps = process.draw()
            after = meter.energy() if meter is not None else None
            if before is not None and after is not None:
                own.joules.append(after - before)
            own.memory = process.memory
        return laps

    return run


def _race_starts(
    contenders: Sequence[Contender],
    measured: Mapping[str, _Measured],
    rounds: int,
    progress: Progress,
) -> dict[str, list[Laps]]:
    """Cold starts, in turns, with no other contender in memory: as many as Ctrl-C leaves."""
    none: dict[str, list[Laps]] = {each.name: [] for each in contenders}
    if not rounds:
        return none

    def starter(each: Contender) -> Run:
        def run() -> Laps:
            with ContenderProcess(each.name, each.job) as process:
                measured[each.name].loads.append(process.load)
                return {"cold start": (process.cold_start,)}

        return run

    task = progress.task("Cold starts", total=len(contenders) * rounds)
    runs = {each.name: starter(each) for each in contenders}
    try:
        return race(runs, rounds, 0, task.advance)
    except KeyboardInterrupt:
        return none


def _timings(
    name: str,
    baseline: str,
    laps: Mapping[str, Sequence[Laps]],
    starts: Mapping[str, Sequence[Laps]],
) -> dict[str, Timing]:
    timings = {}
    for quantity in QUANTITIES:
        source = starts if quantity == "cold start" else laps
        timing = make_timing(quantity, source[name], source[baseline])
        if timing is not None:
            timings[quantity] = timing
    return timings


def _noise(laps: Mapping[str, Sequence[Laps]], baseline: str) -> dict[str, Ratio]:
    """The baseline's ratios to itself."""
    noise = {}
    for quantity in QUANTITIES:
        timing = make_timing(quantity, laps[_TWIN], laps[baseline])
        if timing is not None and timing.ratio is not None:
            noise[quantity] = timing.ratio
    return noise


def _report(each: Contender, own: _Measured, timings: Mapping[str, Timing]) -> ContenderReport:
    return ContenderReport(
        name=each.name,
        title=each.title,
        precision=each.precision,
        is_bundle=each.job.contender == "bundle",
        agreement=own.agreement,
        timings=timings,
        load=statistics.median(own.loads),
        memory=own.memory,
        gpu_memory=own.gpu_memory,
        energy=statistics.median(own.joules) if own.joules else None,
    )


def _workload(job: Job) -> Workload:
    return Workload(
        prompt=job.prompt,
        width=job.width,
        height=job.height,
        steps=job.steps,
        batch=job.batch,
        tokens=job.text_tokens,
        guidance=job.guidance,
        threads=job.threads,
        device=job.device,
    )


def _describe(contenders: Sequence[Contender], meter: GpuMeter | None) -> dict[str, object]:
    machine: dict[str, Any] = describe_machine(["numpy"])
    for each in contenders:
        machine["packages"] |= each.versions
    return machine if meter is None else {**machine, "gpu": meter.name()}
