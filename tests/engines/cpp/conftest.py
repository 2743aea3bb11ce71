"""The C++ library and its programs as `make cpp` builds them."""

from __future__ import annotations

import os
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
from tests.engines.cpp.readers import Readers
from tests.support.shared_folder import SharedFolder

ROOT = Path(__file__).resolve().parents[3]

Inside = Callable[..., bytes]


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    folder = Path(onnxruntime.__file__).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this onnxruntime has no shared library of its own")
    return found[0]


@pytest.fixture(scope="session")
def built(shared_folder: SharedFolder, pytestconfig: pytest.Config) -> Path:
    """The folder of the build, brought up to date with the sources."""
    folder = Path(pytestconfig.getoption("cpp_build") or ROOT / "build" / "cpp")
    if not (folder / "build.ninja").exists():
        reason = f"{folder} is not there: run `make cpp`"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)

    def build(marker: Path) -> None:
        run("cmake", "--build", str(folder))
        marker.mkdir()

    shared_folder.entry("cpp-built", build)
    return folder


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


@pytest.fixture(scope="session")
def readers(built: Path) -> Readers:
    return Readers(built / "fluxdeploy-readers")


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
