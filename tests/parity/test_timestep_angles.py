"""The one thing that the float64 references take from float32: angles, against diffusers' own."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

ULP = 2.0**-23

TIMES = np.linspace(0, 1, 37, dtype=np.float32)
"""Timesteps in 0..1, which FLUX's networks take times 1000."""


def exact_embedding(times: np.ndarray) -> np.ndarray:
    """diffusers' embedding in float64, [N, 256]."""
    from diffusers.models.embeddings import Timesteps

    from tests.support.float64 import exact_arithmetic

    project = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    with exact_arithmetic():
        embedding: np.ndarray = project(torch.from_numpy(times) * 1000).numpy()
    assert embedding.dtype == np.float64
    return embedding


def test_pinned_angles_are_those_of_diffusers_rounded() -> None:
    from diffusers.models.embeddings import Timesteps

    from tests.support.float64 import pinned_angles, timestep_angles

    with pinned_angles():
        project = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        pinned = project(torch.from_numpy(TIMES).double() * 1000).numpy()
    assert pinned.dtype == np.float64
    # An exponent, whose size is up to 9.2, a frequency and an angle are rounded, one after another.
    exponents = np.log(10000) * np.arange(128) / 128
    bound = (exponents + 2) * ULP * np.abs(timestep_angles(1000 * TIMES)) + 1e-12
    assert (np.abs(pinned - exact_embedding(TIMES)) <= np.tile(bound, 2)).all()


def test_the_exporters_embedding_has_these_angles() -> None:
    from exporters.models.mmdit import sinusoidal_embedding
    from tests.support.float64 import timestep_angles

    angles = timestep_angles(1000 * TIMES).astype(np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    found = sinusoidal_embedding(torch.from_numpy(TIMES))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2 * ULP)
