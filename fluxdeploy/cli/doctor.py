"""`fluxdeploy doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxdeploy import __version__
from fluxdeploy.errors import EngineError
from fluxdeploy.machine import describe_cpu, read_memory

if TYPE_CHECKING:
    from rich.table import Table

BASE = "base"

PACKAGES: dict[str, tuple[str, ...]] = {
    BASE: (
        "click",
        "numpy",
        "onnxruntime",
        "pillow",
        "rich",
        "tokenizers",
    ),
    "export": (
        "huggingface_hub",
        "ml_dtypes",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "protobuf",
        "sentencepiece",
        "torch",
        "transformers",
    ),
    "openvino": ("openvino",),
    "gpu": ("onnxruntime-gpu",),
    "tensorrt": ("cuda-python", "tensorrt"),
    "rtx": ("cuda-python", "tensorrt-rtx"),
}
"""The distributions behind each extra that a user may want; pyproject.toml has their versions."""

_PURPOSES = {
    BASE: "generate, inspect, doctor",
    "export": "build, export, verify",
    "openvino": "OpenVINO on CPUs",
    "gpu": "ONNX Runtime on NVIDIA GPUs",
    "tensorrt": "TensorRT",
    "rtx": "TensorRT-RTX",
}

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
        click.echo(json.dumps(report, indent=2))
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
        "notes": _find_conflicts(),
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


def _list_packages() -> dict[str, dict[str, str | None]]:
    packages = {
        extra: {name: _installed_version(name) for name in names}
        for extra, names in PACKAGES.items()
    }
    # The GPU package has all that the CPU one has, and stands in its place.
    packages[BASE]["onnxruntime"] = (
        packages[BASE]["onnxruntime"] or packages["gpu"]["onnxruntime-gpu"]
    )
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
    for runtime in engines.runtimes():
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
        chosen, target = engines.choose_target()
        auto = {"name": chosen.name, "target": target}
    return {"onnxruntime_providers": providers, "runtimes": runtimes, "auto": auto}


def _find_conflicts() -> list[str]:
    notes = []
    if _installed_version("onnxruntime") and _installed_version("onnxruntime-gpu"):
        notes.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall --yes onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    return notes


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, emoji=False)
    cpu, memory = report["cpu"], report["memory"]
    machine = _make_table()
    machine.add_row("fluxdeploy", report["fluxdeploy"])
    machine.add_row("Python", report["python"])
    machine.add_row("Platform", report["platform"])
    machine.add_row("CPU", f"{escape(cpu['name'])}, {cpu['cores']} cores")
    machine.add_row("", " ".join(cpu["instruction_sets"]))
    machine.add_row("Memory", f"{_gib(memory['available'])} free of {_gib(memory['total'])}")
    machine.add_row(
        "Disk", f"{_gib(report['disk']['free'])} free in {escape(report['disk']['folder'])}"
    )
    for gpu in report["gpus"]:
        machine.add_row(
            "GPU",
            f"{escape(gpu['name'])}, {_gib(gpu['memory'])}, driver {gpu['driver']}, "
            f"compute capability {gpu['compute_capability']}",
        )
    if not report["gpus"]:
        machine.add_row("GPU", "none that nvidia-smi lists")
    console.print(machine)

    console.print("\n[bold]Packages[/bold]")
    packages = _make_table()
    for extra, versions in report["packages"].items():
        lines = [", ".join(f"{name} {version}" for name, version in versions.items() if version)]
        if missing := [name for name, version in versions.items() if version is None]:
            install = escape("fluxdeploy" if extra == BASE else f"fluxdeploy[{extra}]")
            lines.append(f"[yellow]missing[/yellow] {', '.join(missing)}: pip install '{install}'")
        packages.add_row(f"{extra}: {_PURPOSES[extra]}", "\n".join(filter(None, lines)))
    console.print(packages)

    console.print("\n[bold]Runtimes[/bold]")
    runtimes = _make_table()
    grouped: dict[tuple[str, bool, str], list[str]] = {}
    for runtime in report["runtimes"]:
        kind = runtime["name"], runtime["ok"], runtime["detail"]
        grouped.setdefault(kind, []).append(runtime["target"])
    for (name, ok, detail), targets in grouped.items():
        mark = "[green]yes[/green]" if ok else "[yellow]no [/yellow]"
        where = targets[0] if len(targets) == 1 else "GPUs"
        runtimes.add_row(f"{mark} {name} on {where}", escape(detail))
    runtimes.add_row("ONNX Runtime has", ", ".join(report["onnxruntime_providers"]) or "-")
    auto = report["auto"]
    runtimes.add_row(
        "--runtime auto takes",
        f"{auto['name']} on {auto['target']}" if auto else "nothing: no runtime can run here",
    )
    console.print(runtimes)
    for note in report["notes"]:
        console.print(f"\n[yellow]Note[/yellow] {note}")


def _make_table() -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
