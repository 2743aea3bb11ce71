"""SigLIP's and CLIP's encoders of pictures against transformers, float32, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxdeploy.errors import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Heads that do not fill a power of two, and pictures that are no whole number of patches.
SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 31,
    "patch_size": 7,
}


@torch.no_grad()
def saved(kind: str, folder: Path, **changes: Any) -> Any:
    """A random encoder, in a folder as transformers saves it."""
    torch.manual_seed(3)
    if kind == "siglip":
        network = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**SIZES, **changes)
        )
    else:
        network = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**SIZES, projection_dim=20, **changes)
        )
    for parameter in network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return network.eval()


def opened(kind: Any, folder: Path) -> tuple[Any, Any]:
    from exporters.checkpoint.image_encoder_config import ImageEncoderConfig, with_vision_names
    from exporters.checkpoint.tensors import read_stored

    weights = with_vision_names(kind, read_stored([folder / "model.safetensors"]))
    config = json.loads((folder / "config.json").read_text())
    return ImageEncoderConfig.of(kind, weights, config), weights


def run(kind: str, config: Any, weights: Any, pixels: np.ndarray) -> np.ndarray:
    from exporters.components.chain import Chain
    from exporters.components.image_encoders import embedding_stages, feature_stages, pixel_values
    from exporters.components.pieces import COMPUTE_TYPES, floats
    from exporters.components.run import run_reference

    make = feature_stages if kind == "siglip" else embedding_stages
    stages = make(config, COMPUTE_TYPES["fp32"], "out")
    chain = Chain(kind, (pixel_values(config),), (floats("out", "B"),), tuple(stages))
    return np.asarray(run_reference(chain, weights, {"pixel_values": pixels})["out"])


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@torch.no_grad()
def test_an_encoder_gives_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    network = saved(kind, tmp_path)
    config, weights = opened(kind, tmp_path)
    assert config.tokens == {"siglip": 16, "clip": 17}[kind]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 31, 31)).astype(np.float32)
    output = network(torch.from_numpy(pixels))
    expected = output.last_hidden_state if kind == "siglip" else output.image_embeds
    found = run(kind, config, weights, pixels)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * float(expected.abs().max())


def test_names_of_each_version_of_transformers_are_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from exporters.checkpoint.image_encoder_config import with_vision_names
    from exporters.checkpoint.tensors import read_stored

    saved("siglip", tmp_path)
    bare = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    whole = {f"vision_model.{name}": tensor for name, tensor in bare.items()}
    whole |= {"text_model.head.weight": torch.ones(1), "logit_bias": torch.ones(1)}
    names = []
    for tensors in (bare, whole):
        save_file(tensors, tmp_path / "again.safetensors")
        names.append(
            set(with_vision_names("siglip", read_stored([tmp_path / "again.safetensors"])))
        )
    assert names[0] == names[1]
    assert not any("head" in name or "text" in name for name in names[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "dinov2"}, "says model_type 'dinov2'"),
    ({"hidden_size": 48}, r"has shape \[36, 3, 7, 7\]; its config.json asks for \[48, 3, 7, 7\]"),
    ({"num_hidden_layers": 3}, "has 2 layers; its config.json asks for 3"),
    ({"image_size": 40}, "position_embedding.weight has shape"),
    ({"image_size": [31, 31]}, "a whole number from 1"),
    ({"num_attention_heads": 7}, "7 heads for a width of 36"),
    ({"hidden_act": "sine"}, "names the activation 'sine'"),
    ({"layer_norm_eps": "small"}, "says layer_norm_eps 'small'"),
    ({"num_channels": 4}, "says num_channels 4"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_config_that_the_tensors_contradict_is_refused(
    changes: dict[str, Any], said: str, siglip: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        siglip(**changes)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The sizes of a saved SigLIP, whose config.json says something else."""
    from exporters.checkpoint.image_encoder_config import ImageEncoderConfig

    folder = tmp_path_factory.mktemp("siglip")
    saved("siglip", folder)
    _, weights = opened("siglip", folder)
    config = json.loads((folder / "config.json").read_text())
    return lambda **changes: ImageEncoderConfig.of("siglip", weights, {**config, **changes})
