"""`fluxdeploy doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxdeploy import __version__
from fluxdeploy.errors import EngineError
from fluxdeploy.install import install_command
from fluxdeploy.machine import describe_cpu, read_memory
from fluxdeploy.precision import DEFAULT_PRECISION
from fluxdeploy.terminal import say_json, show

if TYPE_CHECKING:
    from rich.table import Table

    from engines import Extra

__all__ = ["BASE", "command", "packages_by_extra"]

BASE = "base"

_COMMANDS = {
    BASE: "generate, inspect, doctor",
    "export": "build, export, verify",
    "serve": "serve",
    "control": "generate --control canny",
    "ray": "generate --ray",
}
"""What the packages that every runtime needs are for; the others are the runtimes' own."""

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;.*\bextra == .(?P<extra>[\w-]+))?")

_GPU_FIELDS = ("name", "memory.total", "driver_version", "compute_cap")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine can run.

    Lists the processor, memory, disk and GPUs, which optional packages are installed, which
    runtimes can run a bundle here and why the others cannot, and the runtime that
    `--runtime auto` takes. Nothing is changed, and the exit code is always 0.

    \b
    Examples:
      fluxdeploy doctor
      fluxdeploy doctor --json | jq .runtimes
    """
    report = _make_report()
    if as_json:
        say_json(report, indent=2)
    else:
        _show(report)


def _make_report() -> dict[str, Any]:
    memory = read_memory()
    return {
        "fluxdeploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe_cpu(),
        "memory": {"total": memory.total, "available": memory.available},
        "disk": {"folder": str(Path.cwd()), "free": shutil.disk_usage(".").free},
        "gpus": _list_gpus(),
        "packages": _list_packages(),
        **_describe_runtimes(),
        "notes": _find_notes(),
    }


def _list_gpus() -> list[dict[str, Any]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # there, but without a driver
        return []
    return _parse_gpus(output)


def _parse_gpus(output: str) -> list[dict[str, Any]]:
    """The lines of nvidia-smi's CSV, one GPU each; memory is given in MiB and returned in bytes."""
    gpus = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS):
            continue
        name, memory, driver, capability = values
        gpus.append(
            {
                "name": name,
                "memory": int(memory) * 2**20 if memory.isdigit() else None,
                "driver": driver,
                "compute_capability": capability,
            }
        )
    return gpus


def packages_by_extra() -> dict[str, tuple[str, ...]]:
    """The packages of the base and of each extra that a user may want.

    Those of the base and of `export` are what the installed distribution asks for; each runtime
    tells its own.
    """
    packages: dict[str, list[str]] = {name: [] for name in _COMMANDS}
    for line in _requirements() or ():
        found = _REQUIREMENT.match(line)
        if found is not None and (extra := found["extra"] or BASE) in packages:
            packages[extra].append(found["name"])
    commands = {name: tuple(names) for name, names in packages.items()}
    return commands | {extra.name: extra.packages for extra in _runtimes_extras()}


def _requirements() -> list[str] | None:
    """What the distribution asks for; None where this is a folder that was never installed."""
    try:
        return importlib.metadata.requires("fluxdeploy")
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtimes_extras() -> tuple[Extra, ...]:
    try:
        import engines
    except ImportError:  # NumPy is missing: the base's packages say so
        return ()
    return tuple(runtime.extra for runtime in engines.runtimes() if runtime.extra is not None)


def _list_packages() -> dict[str, dict[str, str | None]]:
    packages = {
        extra: {name: _installed_version(name) for name in names}
        for extra, names in packages_by_extra().items()
    }
    # The GPU package has all that the CPU one has, and stands in its place.
    if "onnxruntime" in packages[BASE] and packages[BASE]["onnxruntime"] is None:
        packages[BASE]["onnxruntime"] = _installed_version("onnxruntime-gpu")
    return packages


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_runtimes() -> dict[str, Any]:
    try:
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
    except (ImportError, AttributeError):  # half-overwritten by another onnxruntime package
        providers = []
    try:
        import engines
    except ImportError:  # NumPy is missing: the packages above say so
        return {"onnxruntime_providers": providers, "runtimes": [], "auto": None}
    runtimes = []
    for runtime in (found for name in engines.runtime_names() for found in engines.runtimes(name)):
        for target in runtime.targets:
            available = runtime.availability(target)
            runtimes.append(
                {
                    "name": runtime.name,
                    "target": target,
                    "version": runtime.version() or None,
                    "ok": available.ok,
                    "detail": available.detail,
                }
            )
    auto: dict[str, str] | None = None
    with contextlib.suppress(EngineError):  # nothing can run here: the list says why
        chosen, target = engines.choose_target(precision=DEFAULT_PRECISION)
        choice = engines.choose_for_cpu(DEFAULT_PRECISION) if target == "cpu" else None
        reason = "" if choice is None else choice.reason
        auto = {"name": chosen.name, "target": target, "reason": reason}
    return {"onnxruntime_providers": providers, "runtimes": runtimes, "auto": auto}


def _find_notes() -> list[str]:
    notes = []
    if _requirements() is None:
        notes.append(
            "fluxdeploy runs from a folder that is not installed, so that the packages it needs "
            "are not known: pip install --editable ."
        )
    if _installed_version("onnxruntime") and _installed_version("onnxruntime-gpu"):
        notes.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall --yes onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    return notes


def _show(report: dict[str, Any]) -> None:
    show(_tabulate_machine(report))
    show("", "Packages", style="bold")
    show(_tabulate_packages(report))
    show("", "Runtimes", style="bold")
    show(_tabulate_runtimes(report))
    for note in report["notes"]:
        show("", f"Note: {note}", style="yellow")


def _tabulate_machine(report: dict[str, Any]) -> Table:
    cpu, memory, disk = report["cpu"], report["memory"], report["disk"]
    table = _make_table()
    table.add_row("fluxdeploy", report["fluxdeploy"])
    table.add_row("Python", report["python"])
    table.add_row("Platform", report["platform"])
    table.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores")
    table.add_row("", " ".join(cpu["instruction_sets"]))
    table.add_row("Memory", f"{_gib(memory['available'])} free of {_gib(memory['total'])}")
    table.add_row("Disk", f"{_gib(disk['free'])} free in {disk['folder']}")
    for gpu in report["gpus"]:
        table.add_row(
            "GPU",
            f"{gpu['name']}, {_gib(gpu['memory'])}, driver {gpu['driver']}, "
            f"compute capability {gpu['compute_capability']}",
        )
    if not report["gpus"]:
        table.add_row("GPU", "none that nvidia-smi lists")
    return table


def _tabulate_packages(report: dict[str, Any]) -> Table:
    table = _make_table()
    purposes = _COMMANDS | {extra.name: extra.purpose for extra in _runtimes_extras()}
    for extra, versions in report["packages"].items():
        there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines = [there] if there else []
        if missing := [name for name, version in versions.items() if version is None]:
            install = install_command(None if extra == BASE else extra)
            lines.append(f"missing {', '.join(missing)}: {install}")
        headings = (f"{extra}: {purposes[extra]}", "")
        for heading, line in zip(headings, lines, strict=False):
            table.add_row(heading, line, style="yellow" if line.startswith("missing") else None)
    return table


def _tabulate_runtimes(report: dict[str, Any]) -> Table:
    table = _make_table()
    grouped: dict[tuple[str, bool, str], list[str]] = {}
    for runtime in report["runtimes"]:
        kind = runtime["name"], runtime["ok"], runtime["detail"]
        grouped.setdefault(kind, []).append(runtime["target"])
    for (name, ok, detail), targets in grouped.items():
        where = targets[0] if len(targets) == 1 else "GPUs"
        mark, style = ("yes", "green") if ok else ("no ", "yellow")
        table.add_row(f"{mark} {name} on {where}", detail, style=style)
    table.add_row("ONNX Runtime has", ", ".join(report["onnxruntime_providers"]) or "-")
    auto = report["auto"]
    table.add_row(
        "--runtime auto takes",
        f"{auto['name']} on {auto['target']}" if auto else "nothing: no runtime can run here",
    )
    if auto and auto["reason"]:
        table.add_row("", auto["reason"])
    return table


def _make_table() -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
