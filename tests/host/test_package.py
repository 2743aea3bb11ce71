from __future__ import annotations

import subprocess
import sys

import pytest

import fluxdeploy


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_loads_neither_numpy_nor_a_framework() -> None:
    loaded = run_python("import fluxdeploy, sys; print(*sys.modules)").split()
    assert not {"numpy", "PIL", "torch", "transformers", "onnxruntime"} & set(loaded)


def test_importing_the_package_is_quick() -> None:
    """It loads one module beside what `typing` and `importlib` are: no clock has to tell."""
    loaded = run_python(
        "import __future__, importlib, sys, typing; before = set(sys.modules);"
        "import fluxdeploy; print(*set(sys.modules) - before)"
    ).split()
    assert loaded == ["fluxdeploy"]


def test_public_names_are_listed_and_found() -> None:
    assert set(fluxdeploy.__all__) <= set(dir(fluxdeploy))
    for name in fluxdeploy.__all__:
        assert getattr(fluxdeploy, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        fluxdeploy.Pipeline  # noqa: B018
