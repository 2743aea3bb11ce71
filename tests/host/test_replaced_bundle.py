"""A pipeline draws from the bundle that it has opened, or says that it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxdeploy import FluxPipeline
from fluxdeploy.errors import BundleError

SMALL: Any = {
    "prompt": "a red circle",
    "height": 64,
    "width": 64,
    "num_inference_steps": 1,
    "seed": 1,
    "output_type": "np",
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it is a link to a file of the package
    path.write_bytes(data)


def _replace(root: Path) -> None:
    newer = shutil.copytree(root, root.with_name("newer"))
    manifest = newer / "fluxdeploy.json"
    manifest.write_text(manifest.read_text().replace('"strength": 0.6', '"strength": 0.7'))
    shutil.rmtree(root)
    newer.rename(root)


CHANGES: dict[str, Callable[[Path], object]] = {
    "bundle": _replace,
    "folder": lambda root: shutil.rmtree(root / "onnx"),
    "graph": lambda root: _flip(root / "onnx/transformer.onnx"),
    "weights": lambda root: _flip(min((root / "onnx/weights").glob("transformer*"))),
    "manifest": lambda root: (root / "fluxdeploy.json").unlink(),
}


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_bundle, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "low_vram"),
    [*((change, False) for change in CHANGES), ("bundle", True), ("weights", True)],
)
def test_another_bundle_is_never_mixed_in(bundle: Path, change: str, low_vram: bool) -> None:
    """Neither after opening, nor between the calls of a pipeline that opens engines each time."""
    with FluxPipeline.from_bundle(bundle, low_vram=low_vram) as pipe:
        if low_vram:
            pipe(**SMALL)
        CHANGES[change](bundle)
        with pytest.raises(BundleError, match="was replaced or changed since it was opened"):
            pipe(**SMALL)


def test_a_pipeline_with_open_engines_goes_on(bundle: Path) -> None:
    with FluxPipeline.from_bundle(bundle) as pipe:
        first = pipe(**SMALL).images
        _replace(bundle)
        np.testing.assert_array_equal(pipe(**SMALL).images, first)
        shutil.rmtree(bundle)
        np.testing.assert_array_equal(pipe(**SMALL).images, first)
