"""A LoRA of the random checkpoint `dev`, and a bundle that it is merged into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.lora import LoraFile
from tests.conftest import build_bundle
from tests.support.loras import write_lora
from tests.support.shared_folder import SharedFolder


@pytest.fixture(scope="session")
def lora(shared_folder: SharedFolder) -> LoraFile:
    """A LoRA, and a strength that is not 1."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_lora(folder / "style.safetensors")

    return LoraFile(shared_folder.entry("lora", make) / "style.safetensors", 0.75)


@pytest.fixture(scope="session")
def merged_bundle(
    shared_folder: SharedFolder,
    checkpoint: Callable[..., Path],
    remembered_traces: Path,
    lora: LoraFile,
) -> Path:
    """The float32 bundle of `dev` with the LoRA merged. Not to be written to."""
    request = BuildRequest(checkpoint=str(checkpoint("dev")), precision="fp32", loras=(lora,))
    return shared_folder.entry("bundle-lora", lambda folder: build_bundle(request, folder))
