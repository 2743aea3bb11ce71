"""One checkpoint in each layout gives one picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fluxdeploy.host.pipeline import FluxPipeline

pytest.importorskip("diffusers")


@pytest.mark.parametrize("layout", ["bfl", "prefixed"])
def test_layouts_give_equal_pictures(
    layout: str, open_pipeline: Callable[..., FluxPipeline]
) -> None:
    diffusers_layout, other = (
        open_pipeline("dev", each)(
            ["A red fox on a sandy beach", "An old castle"],
            height=64,
            width=48,
            num_inference_steps=3,
            seed=5,
            max_sequence_length=40,
            output_type="np",
        ).images
        for each in ("diffusers", layout)
    )
    assert np.array_equal(diffusers_layout, other)
