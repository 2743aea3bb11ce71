"""Slow things that many tests need: random checkpoints and the bundles built from them.

Each is made once a test session, by the first test that asks for it, and shared by all workers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.progress import Progress

CheckpointFactory = Callable[..., Path]
BundleFactory = Callable[..., Path]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers already fill the cores. Before torch is imported, or it is ignored.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class SharedFolder:
    """A folder of the whole test session, whose entries are made once by whoever comes first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`; if it is not there, `make` writes it to the path that it is given."""
        target = self.root / name
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                # Only whole entries get their name: a test that dies half-way leaves none.
                unfinished = self.root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(target)
        return target


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """The folder that the workers of this session share."""
    root = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in the session's; without workers they are the same.
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "shared"
    root.mkdir(exist_ok=True)
    return SharedFolder(root)


@pytest.fixture(scope="session")
def checkpoint(shared_folder: SharedFolder) -> CheckpointFactory:
    """`checkpoint(name, layout="diffusers")`: a random checkpoint, not to be written to.

    `name` is one of `tests.support.checkpoints.SHAPES`; `layout` is "diffusers", "bfl" (a folder)
    or "prefixed" (a single file with ComfyUI's prefix, in a folder with the other parts).
    """

    def make(name: str, layout: str = "diffusers") -> Path:
        pytest.importorskip("diffusers")
        from tests.support.checkpoints import SHAPES, make_checkpoint, to_bfl_layout

        if layout == "diffusers":
            shape = SHAPES[name]
            return shared_folder.entry(
                f"checkpoint-{name}", lambda folder: make_checkpoint(folder, shape)
            )
        source = make(name)
        prefix = {"bfl": "", "prefixed": "model.diffusion_model."}[layout]
        folder = shared_folder.entry(
            f"checkpoint-{name}-{layout}", lambda folder: to_bfl_layout(source, folder, prefix)
        )
        return folder / "flux1.safetensors" if layout == "prefixed" else folder

    return make


@pytest.fixture(scope="session")
def bundle(shared_folder: SharedFolder, checkpoint: CheckpointFactory) -> BundleFactory:
    """`bundle(name, layout="diffusers")`: the float32 bundle of a random checkpoint.

    Not to be written to.
    """

    def make(name: str, layout: str = "diffusers") -> Path:
        source = checkpoint(name, layout)
        return shared_folder.entry(
            f"bundle-{name}-{layout}",
            lambda folder: build_bundle(
                BuildRequest(checkpoint=str(source), precision="fp32"), folder
            ),
        )

    return make


@pytest.fixture(scope="session")
def demo_bundle(shared_folder: SharedFolder) -> Path:
    """The bundle that `fluxdeploy build` makes with no options. Not to be written to."""
    pytest.importorskip("torch")
    return shared_folder.entry("bundle-demo", lambda folder: build_bundle(BuildRequest(), folder))


def build_bundle(request: BuildRequest, folder: Path) -> None:
    """Build a bundle without showing progress."""
    with Progress(quiet=True) as progress:
        build(request, folder, progress)
