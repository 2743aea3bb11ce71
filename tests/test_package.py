"""What the distribution promises: cheap imports, no PyTorch in the host, metadata that agrees."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import engines
import fluxdeploy
from fluxdeploy.cli import COMMANDS
from fluxdeploy.cli.doctor import BASE, packages_by_extra

ROOT = Path(__file__).parent.parent

BUILD_ONLY = ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript")
"""Packages that nobody needs to run a bundle."""

_BUILDING = (
    "engines.emulate.graph",
    *(f"engines.native.{name}" for name in ("build", "kernels", "match", "network", "pack")),
)
"""Modules of the engines that import such packages, and that are imported late."""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, fluxdeploy; print(*{name.partition('.')[0] for name in sys.modules})"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    heavy = {"numpy", "torch", "click", "rich", "onnxruntime", "PIL", "tokenizers"}
    assert heavy.isdisjoint(done.stdout.split())


def list_modules() -> list[str]:
    return sorted(
        info.name
        for package in (fluxdeploy, engines)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        # Graphs are rewritten, and kernels compiled, where the packages for that are installed.
        if not info.name.endswith((".__main__", *_BUILDING))
    )


def test_every_module_of_the_host_imports_without_what_only_builds_need() -> None:
    modules = list_modules()
    assert {"fluxdeploy.host.pipeline", "fluxdeploy.cli.generate", "engines.base"} <= set(modules)
    code = f"""
import importlib, sys, traceback
for name in {BUILD_ONLY!r}:
    sys.modules[name] = None
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception:
        print(name)
        traceback.print_exc()
"""
    done = run_python(code)
    assert done.stdout == "", done.stderr
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_module() -> None:
    missing = [n for n in COMMANDS if not (ROOT / "fluxdeploy" / "cli" / f"{n}.py").is_file()]
    assert missing == []


def test_every_package_says_that_it_is_typed() -> None:
    for package in ("engines", "exporters", "fluxdeploy"):
        assert (ROOT / package / "py.typed").is_file()


def read_project() -> dict[str, list[str]]:
    """The names that each extra (and the base) of pyproject.toml asks for."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {BASE: project["dependencies"], **project["optional-dependencies"]}
    return {
        group: [re.match(r"[\w.-]+", line).group() for line in lines]  # type: ignore[union-attr]
        for group, lines in groups.items()
    }


def test_doctor_lists_the_packages_of_each_extra() -> None:
    groups, listed = read_project(), packages_by_extra()
    assert set(groups) - set(listed) == {"all", "dev"}
    for group, names in listed.items():
        assert sorted(names) == sorted(groups[group]), f"{group}: install fluxdeploy again"


def test_every_package_that_installs_without_a_gpu_is_pinned() -> None:
    groups = read_project()
    pins = {
        line.partition("==")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    for group in (BASE, "dev", "export", "rtx"):
        assert {name.lower().replace("_", "-") for name in groups[group]} <= pins


def test_pytest_passes_over_no_folder_of_tests(request: pytest.FixtureRequest) -> None:
    """By default it does not look into folders with names such as `build` or `dist`."""
    tests = Path(__file__).parent
    folders = {part for file in tests.rglob("test_*.py") for part in file.relative_to(tests).parts}
    assert not folders & set(request.config.getini("norecursedirs"))
