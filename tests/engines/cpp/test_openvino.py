"""OpenVINO's engines in the C++ library, which `make cpp` builds with the wheel's headers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.host.pipeline import FluxPipeline
from tests.conftest import CheckpointFactory, build_bundle
from tests.engines.cpp.conftest import picture
from tests.engines.cpp.library import Failure, Library
from tests.support.shared_folder import SharedFolder

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def bundle(
    shared_folder: SharedFolder, checkpoint: CheckpointFactory, remembered_traces: Path
) -> Path:
    request = BuildRequest(
        checkpoint=str(checkpoint("dev")), precision="fp32", runtimes=("openvino",)
    )
    return shared_folder.entry("bundle-dev-openvino", lambda folder: build_bundle(request, folder))


@pytest.mark.parametrize("image", [0, 1])
def test_a_picture_is_pythons(library: Library, bundle: Path, image: int) -> None:
    call: dict[str, Any] = {"prompt": ["a fox", "狐狸"], "height": 32, "width": 48, "seed": 1}
    call |= {"negative_prompt": "x", "true_cfg_scale": 2.0, "num_inference_steps": 4}
    images = [picture(3, 40, 50)] * image
    with FluxPipeline.from_bundle(bundle) as python:
        given = {"image": images[0]} if image else {}
        wanted = python(**call, **given).images
    cpp = library.pipeline(bundle)
    found, _, _ = cpp(**call, image=images)
    cpp.close()
    difference = found.astype(int) - np.stack([np.asarray(each) for each in wanted])
    assert np.abs(difference).max() <= 1


def test_each_component_passes_its_golden_gate(library: Library, bundle: Path) -> None:
    cpp = library.pipeline(bundle, runtime="openvino")
    assert all(error < 1e-3 and cosine > 0.9999 for error, cosine in cpp.check().values())
    cpp.close()


def test_what_a_bundle_has_is_named_where_another_runtime_is_asked_for(
    library: Library, bundle: Path
) -> None:
    cpp = library.pipeline(bundle, runtime="onnxruntime")
    with pytest.raises(Failure, match="it has engines for openvino on cpu") as failure:
        cpp("a")
    assert failure.value.code == "engine"
    cpp.close()


def test_of_several_editions_the_one_is_run_that_python_takes(
    library: Library, bundle: Path, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "both")
    request = BuildRequest(
        checkpoint=str(checkpoint("dev")), precision="fp32", runtimes=("onnxruntime",)
    )
    build_bundle(request, tmp_path / "both")
    call: dict[str, Any] = {"prompt": "a fox", "height": 32, "width": 48, "seed": 1}
    for runtime in ("auto", "openvino"):
        with FluxPipeline.from_bundle(tmp_path / "both", runtime) as python:
            assert python.bundle.manifest.runtime == runtime.replace("auto", "onnxruntime")
            wanted = python(**call).images
        cpp = library.pipeline(tmp_path / "both", runtime=runtime)
        found, _, _ = cpp(**call)
        cpp.close()
        assert np.abs(found.astype(int) - np.stack([np.asarray(p) for p in wanted])).max() <= 1
