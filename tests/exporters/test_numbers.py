"""What exported graphs compute in ONNX Runtime, against PyTorch and against diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_reference
from fluxdeploy.bundle.manifest import RopeSpec
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from tests.exporters.conftest import Exports
from tests.exporters.numbers import SIZES, error, make_inputs, run


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("fp16", 5e-2)])
@pytest.mark.parametrize("component", COMPONENTS)
def test_onnx_runtime_equals_pytorch(
    exports: Exports, opened: Checkpoint, component: str, precision: str, bound: float
) -> None:
    path = exports(component, precision)
    chain, weights = COMPONENTS[component].source(opened, "fp32")
    for size in SIZES:
        inputs = make_inputs(opened, component, size)
        expected = run_reference(chain, weights, inputs)
        found = run(path, inputs)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert error(found[name], array) < bound, (name, size)


@pytest.fixture(scope="module")
def network(source: Path) -> Any:
    return FluxTransformer2DModel.from_pretrained(source / "transformer").eval()


@pytest.mark.parametrize("size", SIZES)
def test_one_piece_transformer_equals_diffusers_and_the_split_pair(
    exports: Exports, opened: Checkpoint, network: Any, size: tuple[int, ...]
) -> None:
    inputs = make_inputs(opened, "one_piece", size)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = network(**tensors, return_dict=False)[0].numpy()
    whole = run(exports("one_piece", "fp32"), inputs)["latent"]
    assert error(whole, expected) < 2e-4

    # The split pair pairs every timestep with every prompt; the diagonal is the one piece's.
    conditions = run(
        exports("conditioner", "fp32"),
        {
            "text_embeddings": inputs["encoder_hidden_states"],
            "pooled_embeddings": inputs["pooled_projections"],
            "timestep": inputs["timestep"],
            "guidance": inputs["guidance"],
        },
    )
    diagonal = np.arange(size[0])
    config = opened.transformer
    ids = joint_ids(*size[1:4], len(config.axes_dims))
    cos, sin = rope_tables(ids, RopeSpec(config.axes_dims, config.theta))
    split = run(
        exports("transformer", "fp32"),
        {
            "hidden_states": inputs["hidden_states"],
            "context": conditions["context"],
            "modulation": conditions["modulation"][diagonal, diagonal],
            "rope_cos": cos,
            "rope_sin": sin,
        },
    )["velocity"]
    assert error(split, expected) < 2e-4


def test_vae_equals_diffusers(exports: Exports, opened: Checkpoint, source: Path) -> None:
    vae = AutoencoderKL.from_pretrained(source / "vae").eval()
    size = SIZES[1]
    latents, images = (
        make_inputs(opened, name, size)[tensor]
        for name, tensor in (("vae_decoder", "latents"), ("vae_encoder", "images"))
    )
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents)).sample.numpy()
        encoded = vae.encode(torch.from_numpy(images)).latent_dist
    found = run(exports("vae_decoder", "fp32"), {"latents": latents})
    assert error(found["images"], decoded) < 2e-5
    moments = run(exports("vae_encoder", "fp32"), {"images": images})
    assert error(moments["mean"], encoded.mean.numpy()) < 2e-5
    # diffusers clips the log-variance to -30..20, which these values do not reach.
    assert error(moments["logvar"], encoded.logvar.numpy()) < 2e-5
