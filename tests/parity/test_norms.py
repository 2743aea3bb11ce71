"""The norms' epsilons, which only inputs near zero show: pictures cannot tell 1e-5 from 1e-6."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SMALL = 2e-3


def small(*shape: int) -> torch.Tensor:
    return SMALL * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def block() -> torch.nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    torch.manual_seed(0)
    return FluxTransformerBlock(dim=48, num_attention_heads=2, attention_head_dim=24)


@pytest.mark.parametrize("name", ["norm_q", "norm_k", "norm_added_q", "norm_added_k"])
def test_head_norms(block: torch.nn.Module, name: str) -> None:
    from exporters.models.mmdit import JointAttention

    ours = getattr(JointAttention(48, 24), name)
    theirs = getattr(block.attn, name)
    ours.load_state_dict(theirs.state_dict())
    x = small(1, 2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-7)


def test_adaptive_norms(block: torch.nn.Module) -> None:
    from exporters.models.mmdit import AdaptiveNorm

    x, zero = small(1, 5, 48), torch.zeros(1, 1, 48)
    ours = AdaptiveNorm()(x, zero, zero, torch.float32)
    for theirs in (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context):
        torch.testing.assert_close(ours, theirs(x), rtol=1e-5, atol=1e-7)


def test_group_norms() -> None:
    from diffusers import AutoencoderKL

    from exporters.checkpoint.config import VaeConfig
    from exporters.components.pieces import COMPUTE_TYPES
    from exporters.components.vae import VAE_DECODER, VAE_ENCODER

    channels = (8, 16)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
    )
    networks = SimpleNamespace(vae=VaeConfig(16, channels, 1, 4, 1.0, 0.0))
    expected = _group_norms(vae)
    found = {}
    for component in (VAE_DECODER, VAE_ENCODER):
        for stage in component.chain(networks, COMPUTE_TYPES["fp32"]).stages:
            found.update(_group_norms(stage.piece.module, stage.scope))
    assert found == expected


def _group_norms(network: torch.nn.Module, scope: str = "") -> dict[str, tuple[float, int]]:
    return {
        scope + name: (module.eps, module.num_groups)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.GroupNorm)
    }
