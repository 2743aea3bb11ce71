"""The full-size checkpoint of the benchmark is FLUX.1-dev's, in both layouts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.builds.conftest import REPOSITORY


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    pytest.importorskip("torch")
    path = REPOSITORY / "benchmarks" / "full_size.py"
    spec = importlib.util.spec_from_file_location("full_size", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        (
            "diffusers",
            {
                "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": 10**10,
                "transformer/diffusion_pytorch_model-00003-of-00003.safetensors": 4 * 10**9,
                "text_encoder_2/model-00002-of-00002.safetensors": 5 * 10**9,
            },
        ),
        ("bfl", {"flux1-dev.safetensors": 238 * 10**8, "ae.safetensors": 168 * 10**6}),
    ],
)
def test_sizes_and_tensors(
    full_size: ModuleType, tmp_path: Path, layout: str, files: dict[str, int]
) -> None:
    from exporters.checkpoint import open_checkpoint
    from exporters.components.registry import COMPONENTS
    from exporters.synthetic.sparse_checkpoint import FLUX_DEV

    full_size.write_full_size(tmp_path, layout)
    for name, about in files.items():
        assert (tmp_path / name).stat().st_size == pytest.approx(about, rel=0.1)
    taken = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*"))
    assert taken < 8e6, "the files are sparse"
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == layout
    assert checkpoint.transformer == FLUX_DEV.transformer
    assert checkpoint.vae == FLUX_DEV.vae
    for component in COMPONENTS.values():
        chain, weights = component.source(checkpoint, "bf16")
        for stage in chain.stages:
            for parameter, value in stage.piece.module.named_parameters():
                assert weights[stage.scope + parameter].shape == tuple(value.shape)


@pytest.mark.parametrize("model", ["fill", "controlnet"])
def test_other_kinds_are_what_they_are_called(
    full_size: ModuleType, tmp_path: Path, model: str
) -> None:
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.controlnet import with_controlnets

    full_size.write_full_size(tmp_path, "diffusers", model)
    opened = open_checkpoint(tmp_path)
    assert opened.transformer == full_size.MODELS[model][1].transformer
    if model == "controlnet":
        found = with_controlnets(opened, [tmp_path / "controlnet"])
        assert found.controlnets == full_size.MODELS[model][1].controlnets
    else:
        assert opened.task == model
