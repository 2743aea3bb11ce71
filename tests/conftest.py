"""Slow things that many tests need: random checkpoints and the bundles built from them.

Each is made once a test session, by the first test that asks for it, and shared by all workers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.progress import Progress
from tests.parity.controlnets import CASES
from tests.support.shared_folder import SharedFolder

CheckpointFactory = Callable[..., Path]
BundleFactory = Callable[..., Path]

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers already fill the cores. Before torch is imported, or it is ignored.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples",
        type=int,
        metavar="N",
        help="Give each reader of tests/fuzz N damaged inputs: hours for 10000, a few by default.",
    )
    parser.addoption(
        "--cpp-build",
        metavar="FOLDER",
        help="The build of the C++ library that tests/engines/cpp tests, build/cpp by default.",
    )


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
def remembered_traces(shared_folder: SharedFolder) -> Iterator[Path]:
    """A chain is traced once a session, from here on; the folder that the traces are kept in.

    What tests the tracing itself calls `exporters.graph.trace` or starts another process.
    """
    pytest.importorskip("torch")
    from tests.support.traces import Traces

    root = shared_folder.root / "traces"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporters.export.trace_chain", Traces(root))
        yield root


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
def bundle(
    shared_folder: SharedFolder, checkpoint: CheckpointFactory, request: pytest.FixtureRequest
) -> BundleFactory:
    """`bundle(name, layout="diffusers")`: the float32 bundle of a random checkpoint.

    Not to be written to.
    """

    def make(name: str, layout: str = "diffusers") -> Path:
        source = checkpoint(name, layout)
        request.getfixturevalue("remembered_traces")
        return shared_folder.entry(
            f"bundle-{name}-{layout}",
            lambda folder: build_bundle(
                BuildRequest(checkpoint=str(source), precision="fp32"), folder
            ),
        )

    return make


@pytest.fixture(scope="session")
def redux_folder(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """`redux_folder(name)`: a random Redux for a random checkpoint. Not to be written to."""
    from tests.support.checkpoints import SHAPES, make_redux

    def make(name: str) -> Path:
        return shared_folder.entry(f"redux-{name}", lambda path: make_redux(path, SHAPES[name]))

    return make


@pytest.fixture(scope="session")
def redux_bundle(
    shared_folder: SharedFolder,
    checkpoint: CheckpointFactory,
    redux_folder: Callable[[str], Path],
    remembered_traces: Path,
) -> Path:
    """The float32 bundle of `dev` with a Redux. Not to be written to."""
    request = BuildRequest(
        checkpoint=str(checkpoint("dev")), precision="fp32", redux=redux_folder("dev")
    )
    return shared_folder.entry("bundle-redux", lambda folder: build_bundle(request, folder))


@pytest.fixture(scope="session")
def ip_adapter_folder(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """`ip_adapter_folder(name)`: a random IP-Adapter for a random checkpoint, with its encoder."""
    from tests.support.checkpoints import SHAPES, make_ip_adapter

    def make(name: str) -> Path:
        return shared_folder.entry(
            f"ip-adapter-{name}", lambda path: make_ip_adapter(path, SHAPES[name])
        )

    return make


@pytest.fixture(scope="session")
def ip_adapter_bundle(
    shared_folder: SharedFolder,
    checkpoint: CheckpointFactory,
    ip_adapter_folder: Callable[[str], Path],
    remembered_traces: Path,
) -> Path:
    """The float32 bundle of `dev` with an IP-Adapter. Not to be written to."""
    request = BuildRequest(
        checkpoint=str(checkpoint("dev")), precision="fp32", ip_adapter=ip_adapter_folder("dev")
    )
    return shared_folder.entry("bundle-ip-adapter", lambda folder: build_bundle(request, folder))


@pytest.fixture(scope="session")
def demo_bundle(shared_folder: SharedFolder, remembered_traces: Path) -> Path:
    """The bundle that `fluxdeploy build` makes where the processor makes no difference.

    Not to be written to.
    """
    request = BuildRequest(runtimes=("onnxruntime",))
    return shared_folder.entry("bundle-demo", lambda folder: build_bundle(request, folder))


@pytest.fixture(scope="session")
def controlnet_folders(shared_folder: SharedFolder) -> Callable[[str], tuple[Path, ...]]:
    """The folders of the ControlNets of a case of tests/parity/controlnets.py."""
    from tests.support.checkpoints import SHAPES, make_controlnet

    def find(case: str) -> tuple[Path, ...]:
        checkpoint, sizes = CASES[case]
        return tuple(
            shared_folder.entry(
                f"controlnet-{case}-{i}",
                functools.partial(make_controlnet, shape=SHAPES[checkpoint], **each),
            )
            for i, each in enumerate(sizes)
        )

    return find


@pytest.fixture(scope="session")
def union(
    shared_folder: SharedFolder,
    checkpoint: CheckpointFactory,
    controlnet_folders: Callable[[str], tuple[Path, ...]],
    remembered_traces: Path,
) -> Path:
    """A float32 bundle with a Union, whose other components are those of `dev`."""
    request = BuildRequest(
        checkpoint=str(checkpoint("dev")),
        precision="fp32",
        controlnets=controlnet_folders("Union"),
    )
    return shared_folder.entry("bundle-union", lambda folder: build_bundle(request, folder))


def build_bundle(request: BuildRequest, folder: Path) -> None:
    """Build a bundle without showing progress."""
    with Progress(quiet=True) as progress:
        build(request, folder, progress)
