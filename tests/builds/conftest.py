"""Builds that are real but for the tracing, and checkpoints to build from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from tests.support.shared_folder import SharedFolder
from tests.support.specs import latent_spec

if TYPE_CHECKING:
    from tests.support.traces import Traces

__all__ = ["latent_spec"]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums remembered by other tests, or by the user, are not for these."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def recorded(shared_folder: SharedFolder) -> Path:
    """A folder with `bundle`, the bundle of `demo_bundle`, really traced in another process."""
    pytest.importorskip("torch")

    def make(folder: Path) -> None:
        folder.mkdir()
        subprocess.run(
            [
                *(sys.executable, "-m", "fluxdeploy", "build", "--runtime", "onnxruntime"),
                *("--out", folder / "bundle"),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": "31337", "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=600,
        )

    return shared_folder.entry("recorded-build", make)


@pytest.fixture
def traces(remembered_traces: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    """Tracing from memory, and a list of the components that were traced."""
    from tests.support.traces import Traces

    memory = Traces(remembered_traces)
    monkeypatch.setattr("exporters.export.trace_chain", memory)
    return memory


@pytest.fixture(scope="session")
def checkpoints(shared_folder: SharedFolder, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`checkpoints(dtype="BF16", scale=1.0, name=None)`: a checkpoint in other types or weights.

    It is the default one, or a random one of `tests.support.checkpoints.SHAPES`. Every weight is
    multiplied by `scale`, a power of two, so that nothing but the numbers changes.
    Not to be written to.
    """
    pytest.importorskip("torch")

    def make(dtype: str = "BF16", scale: float = 1.0, name: str | None = None) -> Path:
        if name is None:
            source = DEMO_CHECKPOINTS[DEFAULT_CHECKPOINT]
        else:
            source = request.getfixturevalue("checkpoint")(name)

        def write(folder: Path) -> None:
            shutil.copytree(source, folder)
            for file in sorted(folder.rglob("*.safetensors")):
                rewrite(file, dtype, scale)

        return shared_folder.entry(f"{name or 'demo'}-{dtype}-{scale}", write)

    return make


def rewrite(file: Path, dtype: str = "BF16", scale: float = 1.0) -> None:
    """Write a safetensors file anew, as another file, in another type or multiplied."""
    from fluxdeploy.bundle.tensorfile import (
        TensorFileWriter,
        from_float32,
        read_header,
        read_tensor,
        to_float32,
    )

    source = read_header(file)
    declared = [(name, dtype, entry.shape) for name, entry in source.tensors.items()]
    changed = file.with_suffix(".changed")
    with TensorFileWriter(changed, declared) as writer:
        for name, entry in source.tensors.items():
            values = to_float32(read_tensor(source, name), entry.dtype)
            writer.write(from_float32(np.multiply(values, scale, dtype=np.float32), dtype))
    changed.replace(file)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` and its bytes."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
