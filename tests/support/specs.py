"""Fixtures of FLUX.1-dev's constants, as a manifest records them."""

from __future__ import annotations

import pytest

from fluxdeploy.bundle.manifest import LatentSpec, RopeSpec, ScheduleSpec


@pytest.fixture
def latent_spec() -> LatentSpec:
    return LatentSpec(
        channels=16, patch_size=2, spatial_factor=8, scaling_factor=0.3611, shift_factor=0.1159
    )


@pytest.fixture
def rope_spec() -> RopeSpec:
    return RopeSpec(axes_dims=(16, 56, 56), theta=10000.0)


@pytest.fixture
def schedule_spec() -> ScheduleSpec:
    """The schedule of FLUX.1-dev."""
    return ScheduleSpec(
        shift=3.0,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift_terminal=None,
    )
