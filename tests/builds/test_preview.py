"""The map of cheap previews: what a build fits to a VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from fluxdeploy.build.preview import _patches, _pictures, linear_map
from fluxdeploy.errors import NumericError
from tests.support.specs import latent_spec

__all__ = ["latent_spec"]


def test_a_linear_decoder_is_found_again(latent_spec: Any) -> None:
    random = np.random.RandomState(0)
    matrix, bias = random.uniform(-0.02, 0.02, (16, 3)), np.array([0.5, 0.4, 0.6])
    latents = random.standard_normal((3, 16, 8, 8)).astype(np.float32)
    colours = np.einsum("bchw,cr->brhw", latents, matrix) + bias[:, None, None]
    # Whatever is finer than a latent has no say.
    checks = 0.1 * np.where(np.indices((64, 64)).sum(axis=0) % 2, 1, -1)
    images = (colours * 2 - 1).repeat(8, axis=2).repeat(8, axis=3) + checks
    found = linear_map(latents, images.astype(np.float32), latent_spec)
    np.testing.assert_allclose(found.matrix, matrix, atol=2e-4)
    np.testing.assert_allclose(found.bias, bias, atol=2e-4)


def test_channels_that_never_change_have_no_colour(latent_spec: Any) -> None:
    latents = np.zeros((1, 16, 8, 8), np.float32)
    latents[:, 0] = np.random.RandomState(0).standard_normal((8, 8))
    images = np.tanh(latents[:, :1]).repeat(3, axis=1).repeat(8, axis=2).repeat(8, axis=3)
    found = np.array(linear_map(latents, images, latent_spec).matrix)
    assert (found[0] > 0.1).all()
    assert (found[1:] == 0).all()


def test_a_vae_without_any_variety_has_a_map(latent_spec: Any) -> None:
    latents, images = np.ones((1, 16, 2, 2), np.float32), np.ones((1, 3, 16, 16), np.float32)
    found = linear_map(latents, images, latent_spec)
    assert found.bias == (1, 1, 1)
    assert not np.any(found.matrix)


@pytest.mark.parametrize("side", ["latents", "images"])
def test_what_is_no_number_is_refused(latent_spec: Any, side: str) -> None:
    given = {"latents": np.ones((1, 16, 2, 2)), "images": np.ones((1, 3, 16, 16))}
    given[side][0, 0, 0, 0] = np.nan
    with pytest.raises(NumericError, match="NaN or infinity"):
        linear_map(
            **{name: array.astype(np.float32) for name, array in given.items()}, spec=latent_spec
        )


@pytest.mark.parametrize("side", [96, 144])
def test_pictures_to_fit_over_are_always_the_same(side: int) -> None:
    pictures = _pictures(side)
    for picture, again in zip(pictures, _pictures(side), strict=True):
        np.testing.assert_array_equal(picture, again)
        assert picture.shape == (1, 3, side, side)
        assert picture.dtype == np.float32
        assert -1 <= picture.min() < 0 < picture.max() <= 1
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_checkpoint_without_an_encoder_has_latents_to_fit_over() -> None:
    for latents in _patches(18, 4):
        assert latents.shape == (1, 4, 18, 18)
        assert latents.dtype == np.float32
        assert 0.5 < latents.std() < 2
