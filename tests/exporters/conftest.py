"""A small checkpoint to read and to break, and its components, each exported once a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from safetensors.torch import load_file, save_file

from exporters.checkpoint import Checkpoint, Weights, open_checkpoint
from exporters.export import ExportSpec, export_component, specify
from exporters.weights.bind import WeightFolder
from tests.exporters.numbers import GRAPHS
from tests.support.tokenizers import demo, prompts

__all__ = ["demo", "prompts"]

Tensors = dict[str, torch.Tensor]
Exports = Callable[..., Path]
"""`exports(component, precision, fused=False, casts=False)`: the ONNX file; `one_piece` is the
`--no-split` transformer, `fused` ones are for ONNX Runtime, with `casts` as they are traced."""

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a field of None is removed."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_tensors(path: Path, change: Callable[[Tensors], Any]) -> None:
    """Rewrite a safetensors file after `change` has worked on its tensors."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def assert_equal_weights(one: Weights, other: Weights) -> None:
    """The same names and, to the bit, the same values."""
    assert one.keys() == other.keys()
    for name, stored in one.items():
        assert stored.shape == other[name].shape, name
        assert (stored.read() == other[name].read()).all(), name


@pytest.fixture(scope="session")
def source(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint in diffusers layout, float32, not to be written to."""
    return checkpoint("dev")


@pytest.fixture(scope="session")
def opened(source: Path) -> Checkpoint:
    return open_checkpoint(source)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


@pytest.fixture
def bfl(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint in BFL layout to change: a folder with flux1.safetensors."""
    return Path(shutil.copytree(checkpoint("dev", "bfl"), tmp_path / "bfl"))


@pytest.fixture(scope="session")
def exports(shared_folder: Any, opened: Checkpoint, remembered_traces: Path) -> Exports:
    def make(component: str, precision: str, fused: bool = False, casts: bool = False) -> Path:
        form = "casts" if casts else "fused" if fused else "standard"
        folder = shared_folder.entry(
            f"export-{component}-{precision}-{form}",
            lambda target: export_fused(
                specify(opened, GRAPHS[component], precision, "fp32"), target, fused, casts
            ),
        )
        return Path(folder) / f"{GRAPHS[component].name}.onnx"

    return make


def export_fused(spec: ExportSpec, target: Path, fused: bool, casts: bool) -> None:
    """Write a component's graph; one with `casts` is fused, and computes in float32 between."""
    with pytest.MonkeyPatch.context() as patch:
        if casts:
            patch.setattr("exporters.export.keep_16_bits", lambda model: None)
        export_component(spec, WeightFolder(target / "weights"), fused=fused or casts)
