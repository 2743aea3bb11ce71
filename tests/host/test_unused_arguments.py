"""Arguments that do nothing are told, once, to whoever called."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UnusedArgumentWarning
from fluxdeploy.host.pipeline import FluxPipeline

LATENTS = np.zeros((1, 6, 64), np.float32)


def told(pipe: FluxPipeline, **options: Any) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe("a fox", max_sequence_length=16, **options)
    assert {each.category for each in caught} <= {UnusedArgumentWarning}
    assert {each.filename for each in caught} <= {__file__}
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "fog"}, "`negative_prompt` does nothing unless `true_cfg_scale`"),
        (
            {"negative_prompt": "", "true_cfg_scale": 0.5},
            "`negative_prompt` does nothing unless `true_cfg_scale`",
        ),
        ({"true_cfg_scale": 2.0}, "`true_cfg_scale` does nothing without `negative_prompt`"),
        ({"true_cfg_scale": 0.5}, "`true_cfg_scale` does nothing without `negative_prompt`"),
        ({"strength": 0.5}, "`strength` does nothing without `image`"),
        ({"seed": 1, "latents": LATENTS}, "`seed` does nothing beside `latents`"),
    ],
)
def test_each_is_told_once(pipe: FluxPipeline, options: dict[str, Any], message: str) -> None:
    (notice,) = told(pipe, **options)
    assert notice.startswith(message)
    assert told(pipe, **options) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 1},
        {"latents": LATENTS},
        {"strength": None},
        {"guidance_scale": 2.0},
        {"negative_prompt": "", "true_cfg_scale": 1.5},
    ],
)
def test_nothing_is_told_of_arguments_that_are_used(
    pipe: FluxPipeline, options: dict[str, Any]
) -> None:
    assert told(pipe, **options) == []


def test_several_are_told_each(pipe: FluxPipeline) -> None:
    assert len(told(pipe, negative_prompt="fog", strength=0.1, seed=1, latents=LATENTS)) == 3


def test_guidance_without_an_embedding_is_told(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest
) -> None:
    pipe = make_pipeline(dataclasses.replace(manifest, guidance_embedding=False))
    assert told(pipe) == []
    (notice,) = told(pipe, guidance_scale=3.5)
    assert "no guidance embedding" in notice


def test_another_pipeline_tells_again(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest
) -> None:
    for _ in range(2):
        assert len(told(make_pipeline(manifest), strength=0.1)) == 1
