"""A benchmark's tables, in words: the terminal and the HTML page show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxdeploy.bench.clock import Ratio, Timing
from fluxdeploy.bench.report.record import QUANTITIES, BenchReport, ContenderReport

__all__ = ["TextTable", "describe_machine_in_words", "labels", "make_tables", "notes", "seconds"]

_PARTS = ("transformer", "host", "clip", "t5", "conditioner", "vae_decoder")


@dataclass(frozen=True)
class TextTable:
    """A table whose first column names the rows; the other columns are figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def labels(report: BenchReport) -> dict[str, str]:
    """What tables and plots call the contenders: bundles by their folders, without the way there
    where no two have the same name."""
    folders = [Path(each.name).name for each in report.contenders if each.is_bundle]
    called = {}
    for each in report.contenders:
        folder = Path(each.name).name
        short = each.is_bundle and folders.count(folder) == 1
        name = folder if short else each.name
        called[each.name] = f"{name} ({each.precision})" if each.is_bundle else name
    return called


def seconds(value: float) -> str:
    """A duration with three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{_three(value * factor)} {unit}"
    raise AssertionError(value)


def make_tables(report: BenchReport) -> list[TextTable]:
    """All tables, most wanted first."""
    work = report.workload
    pictures = "A picture" if work.batch == 1 else f"{work.batch} pictures"
    size = f"{pictures} of {work.width}x{work.height} in {work.steps} steps"
    tables = [
        _timing_table(report, "picture", size),
        _timing_table(report, "step", "A step"),
        _parts_table(report),
        _start_table(report),
    ]
    if len(report.contenders) > 1:
        tables.append(_agreement_table(report))
    return tables


def notes(report: BenchReport) -> list[str]:
    """What one must know to read the tables."""
    baseline = labels(report)[report.baseline]
    threads = report.workload.threads
    if report.one_by_one:
        how = (
            f"{report.rounds} rounds; in each, every contender draws once, in a new process that "
            "has drawn before"
        )
    else:
        how = (
            f"{report.rounds} rounds after {report.warmup} for warming up; in each, every "
            "contender draws once"
        )
    lines = [
        f"{how}, on {threads} {'thread' if threads == 1 else 'threads'}. Times faster than "
        f"{baseline}: the median of the rounds' ratios, and the middle 80% of them.",
    ]
    noise = report.noise.get("picture")
    if noise is not None:
        lines.append(
            f"Noise: held against itself, {baseline} comes to {_ratio(noise)}. A ratio as near to "
            "1 says nothing."
        )
    conditioned = ["conditioner" in each.timings for each in report.contenders]
    if any(conditioned) and not all(conditioned):
        lines.append(
            "Pipelines without a conditioner do its work in their transformer, in every step."
        )
    if report.cold_starts:
        lines.append(
            "A cold start lasts from a new process to a saved picture. Its files are in the "
            "system's cache."
        )
    return lines


def describe_machine_in_words(report: BenchReport) -> str:
    """The machine, its system and the packages, in one line."""
    machine = report.machine
    parts = [str(machine.get("cpu", "")), f"{machine.get('cores', '?')} cores"]
    memory = machine.get("memory_bytes")
    if isinstance(memory, int):
        parts.append(f"{memory / 2**30:.0f} GiB")
    if machine.get("gpu"):
        parts.append(str(machine["gpu"]))
    parts += [str(machine.get("system", "")), f"Python {machine.get('python', '?')}"]
    packages = machine.get("packages")
    if isinstance(packages, dict):
        parts += [f"{name} {version}" for name, version in packages.items()]
    return ", ".join(part for part in parts if part)


def _timing_table(report: BenchReport, quantity: str, title: str) -> TextTable:
    headings = ["", "p50", "p90", "p99", "times faster"]
    if quantity == "picture":
        headings.append("images/min")
    rows = []
    called = labels(report)
    for each in report.contenders:
        timing = each.timings[quantity]
        row = [called[each.name], *map(seconds, (timing.p50, timing.p90, timing.p99))]
        row.append(_faster(report, each, quantity))
        if quantity == "picture":
            row.append(_three(each.images_per_minute(report.workload.batch)))
        rows.append(tuple(row))
    return TextTable(title, tuple(headings), tuple(rows))


def _parts_table(report: BenchReport) -> TextTable:
    columns = [name for name in _PARTS if any(name in each.timings for each in report.contenders)]
    called = labels(report)
    rows = tuple(
        (called[each.name], *(_median(each, column) for column in columns))
        for each in report.contenders
    )
    headings = tuple(QUANTITIES[column] for column in columns)
    return TextTable(
        "Where the time goes: of a step the first two, of a picture the rest; medians",
        ("", *headings),
        rows,
    )


def _start_table(report: BenchReport) -> TextTable:
    starts = ("cold start", "times faster") if report.cold_starts else ()
    headings = ["", *starts, "opening it", "memory"]
    on_gpu = any(each.gpu_memory is not None for each in report.contenders)
    counted = any(each.energy is not None for each in report.contenders)
    if on_gpu:
        headings.append("GPU memory")
    if counted:
        headings.append("energy")
    rows = []
    called = labels(report)
    for each in report.contenders:
        row = [called[each.name]]
        if report.cold_starts:
            row += [_median(each, "cold start"), _faster(report, each, "cold start")]
        row += [seconds(each.load), _bytes(each.memory)]
        if on_gpu:
            row.append(_bytes(each.gpu_memory))
        if counted:
            row.append("" if each.energy is None else f"{_three(each.energy)} J")
        rows.append(tuple(row))
    return TextTable("Start and memory", tuple(headings), tuple(rows))


def _agreement_table(report: BenchReport) -> TextTable:
    called = labels(report)
    rows = tuple(
        (
            called[each.name],
            f"{each.agreement.velocity_error:.1e}",
            "equal" if each.agreement.psnr is None else f"{each.agreement.psnr:.1f} dB",
        )
        for each in report.contenders[1:]
    )
    title = f"Against {called[report.contenders[0].name]}, equal noise"
    return TextTable(title, ("", "first step off by", "picture"), rows)


def _median(contender: ContenderReport, quantity: str) -> str:
    timing: Timing | None = contender.timings.get(quantity)
    return "" if timing is None else seconds(timing.p50)


def _faster(report: BenchReport, contender: ContenderReport, quantity: str) -> str:
    timing = contender.timings.get(quantity)
    if timing is None or timing.ratio is None:
        return ""
    return "1" if contender.name == report.baseline else _ratio(timing.ratio)


def _ratio(ratio: Ratio) -> str:
    ends: Sequence[float] = (ratio.low, ratio.high)
    return f"{ratio.median:.2f} ({' to '.join(f'{end:.2f}' for end in ends)})"


def _three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
