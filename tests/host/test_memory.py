"""Calls that need far more memory than is free are refused before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import TiledWarning, UsageError
from fluxdeploy.host import memory, tiles
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import Memory
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.rope import joint_ids, rope_tables

Make = Callable[[Manifest], FluxPipeline]
MakeMemory = Callable[[int | None], None]

RECORDED = {
    "transformer_bytes": {"per_token": 100_000, "per_pair_of_tokens": 50},
    "vae_bytes_per_pixel": {"vae_decoder": 6000, "vae_encoder": 3000},
}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> MakeMemory:
    """Pretend that so many bytes are free, of a machine without swap."""

    def pretend(available: int | None, swap: int = 0) -> None:
        for module in (memory, tiles):
            monkeypatch.setattr(module, "read_memory", lambda: Memory(available, available, swap))
        monkeypatch.setattr(memory, "resident_memory", lambda: 0)

    return pretend


@pytest.fixture
def pipe(make_pipeline: Make, manifest: Manifest) -> FluxPipeline:
    return make_pipeline(replace(manifest, provenance=RECORDED))


def test_a_picture_that_memory_cannot_hold_is_refused_before_anything_runs(
    pipe: FluxPipeline, engines: dict, free: MakeMemory
) -> None:
    free(8_000_000_000)
    with pytest.raises(UsageError, match=r"4096x4096 pixels need about 2.* GB") as caught:
        pipe("a fox", height=4096, width=4096)
    assert "the transformer" in str(caught.value)
    assert "8.0 GB are free" in str(caught.value)
    assert "smaller size" in str(caught.value)
    assert not any(engine.runs for engine in engines.values())


def test_many_pictures_are_refused_for_their_pixels(
    make_pipeline: Make, manifest: Manifest, free: MakeMemory
) -> None:
    free(8_000_000_000)
    pipe = make_pipeline(manifest)
    with pytest.raises(UsageError, match=r"the pictures.*fewer pictures"):
        pipe("a fox", height=2048, width=2048, num_images_per_prompt=1000)


@pytest.mark.parametrize("available", [None, 100_000_000_000, 160_000_000])
def test_what_may_run_is_not_refused(
    pipe: FluxPipeline, free: MakeMemory, available: int | None
) -> None:
    free(available)
    pipe("a fox", height=128, width=128, num_inference_steps=1, output_type="np")


def test_swap_counts(pipe: FluxPipeline, free: Callable[..., None]) -> None:
    size = {"height": 128, "width": 128, "num_inference_steps": 1}
    free(1_000_000)
    with pytest.raises(UsageError, match="the VAE"):
        pipe("a fox", **size)
    free(1_000_000, 1_000_000_000)
    pipe("a fox", **size)


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"transformer_bytes": 3},
        {"transformer_bytes": {"per_token": "x"}},
        {"transformer_bytes": {"per_token": 10**9, "per_pair_of_tokens": -1}},
        {"transformer_bytes": {"per_token": 10**9}},
        {"transformer_bytes": {"per_token": 10**400, "per_pair_of_tokens": 0}},
        {"vae_bytes_per_pixel": {"vae_decoder": 10**400}},
    ],
)
def test_what_a_bundle_does_not_record_is_not_refused(
    make_pipeline: Make, manifest: Manifest, free: MakeMemory, provenance: dict
) -> None:
    free(20_000_000)
    make_pipeline(replace(manifest, provenance=provenance))("a fox", num_inference_steps=1)


def test_tiles_are_told_to_the_caller_and_warned_of_once(
    pipe: FluxPipeline, free: MakeMemory
) -> None:
    free(2_000_000_000)
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            output = pipe(
                "a fox", height=1792, width=512, num_inference_steps=1, num_images_per_prompt=2
            )
            told.append(output.notices)
    assert told[0] == told[1]
    (notice,) = told[0]
    assert notice.startswith("The 512x1792 picture was decoded in tiles of 512x768 pixels")
    (warning,) = caught
    assert warning.category is TiledWarning
    assert warning.filename == __file__


@pytest.mark.parametrize("side", [2048, 4096, 8192, 1 << 16])
def test_levels_and_positions_of_large_pictures_are_numbers(manifest: Manifest, side: int) -> None:
    tokens = side // manifest.latents.token_side
    try:
        levels = schedule.sigmas(manifest.schedule, 50, tokens**2)
    except UsageError:
        assert side > 4096, "what engines take has levels"
    else:
        assert np.isfinite(levels).all()
        assert (np.diff(levels) <= 0).all()
        assert levels[0] == 1
    # A column of the grid: the farthest positions are among them.
    ids = joint_ids(2, tokens, 1, 3)
    ids[:, 2] = ids[:, 1]
    for table in rope_tables(ids, manifest.rope):
        assert np.isfinite(table).all()
        assert np.abs(table).max() <= 1
