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
from tests.parity.bounds import assert_as_exact
from tests.support.float64 import exact_arithmetic, pinned_angles

FLOOR = 16 * 2.0**-23
"""Some last bits of float32, of the largest value."""


def assert_close(found: np.ndarray, float32: np.ndarray, exact: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert_as_exact(found, float32, exact, FLOOR * float(np.abs(exact).max()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_onnx_runtime_equals_pytorch(
    exports: Exports, opened: Checkpoint, component: str, precision: str
) -> None:
    path = exports(component, precision)
    chain, weights = COMPONENTS[component].source(opened, "fp32")
    for size in SIZES:
        inputs = make_inputs(opened, component, size)
        expected = run_reference(chain, weights, inputs)
        found = run(path, inputs)
        assert found.keys() == expected.keys()
        if precision == "fp32":
            with exact_arithmetic():
                exact = run_reference(chain, weights, inputs)
            for name, array in exact.items():
                assert_close(found[name], expected[name], array)
        else:
            for name, array in expected.items():
                assert error(found[name], array) < 5e-2, (name, size)


@pytest.fixture(scope="module")
def networks(source: Path) -> tuple[Any, Any]:
    """diffusers' transformer in float32 and in float64."""
    one, other = (
        FluxTransformer2DModel.from_pretrained(source / "transformer").eval() for _ in range(2)
    )
    return one, other.double()


@pytest.mark.parametrize("size", SIZES)
def test_one_piece_transformer_equals_diffusers_and_the_split_pair(
    exports: Exports, opened: Checkpoint, networks: tuple[Any, Any], size: tuple[int, ...]
) -> None:
    inputs = make_inputs(opened, "one_piece", size)

    def compute(network: Any) -> Any:
        with torch.no_grad(), pinned_angles():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            return network(**tensors, return_dict=False)[0].numpy()

    float32 = compute(networks[0])
    with exact_arithmetic():
        exact = compute(networks[1])
    whole = run(exports("one_piece", "fp32"), inputs)["latent"]
    assert_close(whole, float32, exact)

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
    assert_close(split, float32, exact)


def test_vae_equals_diffusers(exports: Exports, opened: Checkpoint, source: Path) -> None:
    vae = AutoencoderKL.from_pretrained(source / "vae").eval()
    wide = AutoencoderKL.from_pretrained(source / "vae").eval().double()
    size = SIZES[1]
    latents, images = (
        make_inputs(opened, name, size)[tensor]
        for name, tensor in (("vae_decoder", "latents"), ("vae_encoder", "images"))
    )

    def compute(network: Any) -> dict[str, Any]:
        with torch.no_grad():
            encoded = network.encode(torch.from_numpy(images)).latent_dist
            decoded = network.decode(torch.from_numpy(latents)).sample
        values = {"images": decoded, "mean": encoded.mean, "logvar": encoded.logvar}
        return {name: value.numpy() for name, value in values.items()}

    float32 = compute(vae)
    with exact_arithmetic():
        exact = compute(wide)
    # diffusers clips the log-variance to -30..20, which these values do not reach.
    found = run(exports("vae_decoder", "fp32"), {"latents": latents})
    found |= run(exports("vae_encoder", "fp32"), {"images": images})
    for name, array in exact.items():
        assert_close(found[name], float32[name], array)
