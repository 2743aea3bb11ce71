"""The C++ library as `make cpp` builds it: once a session, and at once where nothing changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from fluxdeploy.build.resolve import BuildRequest
from tests.conftest import BundleFactory, CheckpointFactory, build_bundle
from tests.engines.cpp.library import Library
from tests.support.shared_folder import SharedFolder

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "cpp"
HEADERS = ROOT / "build" / "onnxruntime"

Inside = Callable[..., bytes]


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    folder = Path(onnxruntime.__file__).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime has no shared library of its own")
    return found[0]


@pytest.fixture(scope="session")
def built(shared_folder: SharedFolder, onnxruntime_library: Path) -> Path:
    """The folder of the build."""

    def build(marker: Path) -> None:
        options = {
            "FLUXDEPLOY_WERROR": "ON",
            "FLUXDEPLOY_EXAMPLES": "ON",
            "FLUXDEPLOY_TESTS": "ON",
            "FLUXDEPLOY_ONNXRUNTIME_INCLUDE": HEADERS,
            "FLUXDEPLOY_ONNXRUNTIME": onnxruntime_library,
        }
        settings = [word for name, value in options.items() for word in ("-D", f"{name}={value}")]
        source = str(ROOT / "engines" / "cpp")
        run("cmake", "-S", source, "-B", str(BUILD), "-G", "Ninja", "-Wno-dev", *settings)
        run("cmake", "--build", str(BUILD))
        marker.mkdir()

    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing or not HEADERS.is_dir():
        reason = "run `make cpp`, which brings what the C++ library is built with"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    shared_folder.entry("cpp-built", build)
    return BUILD


@pytest.fixture(scope="session")
def bundle(
    shared_folder: SharedFolder, checkpoint: CheckpointFactory, remembered_traces: Path
) -> BundleFactory:
    """As the fixture of all tests, which the one of tests/engines hides, and with its bundles."""

    def make(name: str) -> Path:
        source = str(checkpoint(name))
        return shared_folder.entry(
            f"bundle-{name}-diffusers",
            lambda folder: build_bundle(BuildRequest(checkpoint=source, precision="fp32"), folder),
        )

    return make


@pytest.fixture(scope="session")
def library(built: Path, onnxruntime_library: Path) -> Library:
    return Library(built / "libfluxdeploy.so", onnxruntime_library)


@pytest.fixture(scope="session")
def inside(built: Path) -> Inside:
    """`inside("noise", 7, 100)`: the bytes that the program inside.cpp answers with."""

    def ask(*words: object, given: bytes = b"") -> bytes:
        program = [str(built / "fluxdeploy-inside"), *map(str, words)]
        return subprocess.run(program, input=given, capture_output=True, check=True).stdout

    return ask


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a program to its end; what it printed. Fails the test with that where it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with shapes at every scale."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    fine = random.randint(0, 64, (height, width, 3), np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width] // 2 + fine
