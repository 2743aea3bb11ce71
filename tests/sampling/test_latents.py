from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.latents import (
    check_size,
    latent_shape,
    pack,
    sample_posterior,
    scale,
    token_grid,
    unpack,
    unscale,
)

SIZES = [(1, 16, 16), (2, 64, 32), (3, 48, 176)]


def random_latents(batch: int, height: int, width: int, spec: LatentSpec) -> np.ndarray:
    shape = latent_shape(batch, height, width, spec)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_packing_equals_diffusers(
    latent_spec: LatentSpec, batch: int, height: int, width: int
) -> None:
    torch = pytest.importorskip("torch")
    flux = pytest.importorskip("diffusers").FluxPipeline
    latents = random_latents(batch, height, width, latent_spec)
    _, channels, h, w = latents.shape
    packed = flux._pack_latents(torch.from_numpy(latents), batch, channels, h, w)
    np.testing.assert_array_equal(pack(latents, latent_spec), packed.numpy())
    unpacked = flux._unpack_latents(packed, height, width, latent_spec.spatial_factor)
    np.testing.assert_array_equal(
        unpack(packed.numpy(), height, width, latent_spec), unpacked.numpy()
    )


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpacking_undoes_packing(
    latent_spec: LatentSpec, batch: int, height: int, width: int, patch_size: int
) -> None:
    spec = dataclasses.replace(latent_spec, patch_size=patch_size, spatial_factor=16 // patch_size)
    latents = random_latents(batch, height, width, spec)
    packed = pack(latents, spec)
    rows, columns = token_grid(height, width, spec)
    assert packed.shape == (batch, rows * columns, 16 * patch_size**2)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(unpack(packed, height, width, spec), latents)


def test_a_token_holds_one_patch_with_channels_first(latent_spec: LatentSpec) -> None:
    latents = random_latents(1, 32, 48, latent_spec)
    # Token 4 of a 2 x 3 grid: row 1, column 1.
    np.testing.assert_array_equal(
        pack(latents, latent_spec)[0, 4], latents[0, :, 2:4, 2:4].reshape(-1)
    )


def test_unscaling_divides_first_and_then_shifts(latent_spec: LatentSpec) -> None:
    scaled = np.array([[[[0.0, 0.3611, -0.7222]]]], np.float32)
    unscaled = unscale(scaled, latent_spec)
    assert unscaled.dtype == np.float32
    np.testing.assert_allclose(unscaled[0, 0, 0], [0.1159, 1.1159, -1.8841], rtol=1e-6)


def test_multiples_of_16_are_accepted(latent_spec: LatentSpec) -> None:
    for height, width in [(16, 16), (1024, 768), (2048, 16)]:
        check_size(height, width, latent_spec)
    assert latent_shape(2, 1024, 768, latent_spec) == (2, 16, 128, 96)
    assert token_grid(1024, 768, latent_spec) == (64, 48)


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [
        (1000, 1024, "1024x992 or 1024x1008"),
        (1024, 1000, "992x1024 or 1008x1024"),
        (8, 8, "16x16"),
        (0, 512, "512x16"),
        (-16, -20, "16x16"),
        (520, 511, "496x512 or 512x528"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_ones(
    latent_spec: LatentSpec, height: int, width: int, nearest: str
) -> None:
    with pytest.raises(UsageError, match=rf"multiples of 16\. The nearest sizes are {nearest}\."):
        check_size(height, width, latent_spec)


def test_scale_is_bit_equal_to_diffusers_and_undone_by_unscale(latent_spec: LatentSpec) -> None:
    torch = pytest.importorskip("torch")
    latents = np.random.default_rng(0).standard_normal((2, 16, 4, 6), np.float32)
    shift, factor = latent_spec.shift_factor, latent_spec.scaling_factor
    expected = (torch.from_numpy(latents) - shift) * factor
    np.testing.assert_array_equal(scale(latents, latent_spec), expected.numpy())
    np.testing.assert_allclose(
        unscale(scale(latents, latent_spec), latent_spec), latents, atol=1e-6
    )


def test_draws_of_the_posterior_equal_diffusers() -> None:
    torch = pytest.importorskip("torch")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    random = np.random.default_rng(0)
    mean, noise = random.standard_normal((2, 2, 16, 4, 6), np.float32)
    logvar = np.linspace(-40, 30, mean.size, dtype=np.float32).reshape(mean.shape)
    moments = torch.from_numpy(np.concatenate([mean, logvar], axis=1))
    posterior = vae.DiagonalGaussianDistribution(moments)
    expected = posterior.mean + posterior.std * torch.from_numpy(noise)
    np.testing.assert_allclose(sample_posterior(mean, logvar, noise), expected.numpy(), rtol=1e-6)
