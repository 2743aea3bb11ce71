"""Steps without the transformer, and custom noise levels, through the whole pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import SkipRecord
from fluxdeploy.errors import UnmeasuredSkipsWarning, UsageError
from fluxdeploy.host.course import check_sigmas, check_skip, unmeasured
from fluxdeploy.host.loop import denoise
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.sampler import load_sampler
from fluxdeploy.sampling.skipping import Skips, extrapolation
from tests.host.conftest import MemoryEngine

OPTIONS: dict[str, Any] = {"seed": 1, "max_sequence_length": 16, "output_type": "np"}
RECORD = SkipRecord("euler", 3, (2,), 0, 32, 48, 30.0, 31.5, 4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_extrapolation_of_an_order_is_exact_for_polynomials_of_it(order: int) -> None:
    known = [0.9, 0.7, 0.6][: order + 1]
    weights = extrapolation(known, 0.35)
    for degree in range(order + 1):
        found = sum(w * s**degree for w, s in zip(weights, known, strict=True))
        assert found == pytest.approx(0.35**degree)


def test_a_skipped_step_goes_on_from_real_velocities_alone() -> None:
    sigmas = np.linspace(1, 0, 7, dtype=np.float32)
    seen: list[int] = []

    def velocity(level: int, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(level)
        return np.full_like(latents, sigmas[level])

    sampler = load_sampler("euler")
    whole, some = (np.zeros((1, 1, 1), np.float32) for _ in range(2))
    denoise(sampler, whole, sigmas, velocity)
    seen.clear()
    denoise(sampler, some, sigmas, velocity, skips=Skips((2, 3, 5)))
    assert seen == [0, 1, 4]
    np.testing.assert_allclose(some, whole, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "ab2", "dpmpp_2m"])
def test_the_transformer_does_not_run_in_skipped_steps(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], sampler: str
) -> None:
    pipe("a fox", negative_prompt="fog", true_cfg_scale=2.0, sampler=sampler, skip=[2], **OPTIONS)
    assert len(engines["transformer"].runs) == 4  # two steps of two prompts


def test_auto_takes_the_manifests_record_and_tells_of_other_sizes(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    with pytest.raises(UsageError, match=r"no steps to skip for 3 steps .* none at all"):
        pipe("a fox", skip="auto", **OPTIONS)
    bundle = pipe.bundle
    manifest = dataclasses.replace(bundle.manifest, skips=(RECORD,))
    object.__setattr__(bundle, "manifest", manifest)
    pipe("a fox", skip="auto", height=32, width=48, **OPTIONS)
    assert len(engines["transformer"].runs) == 2
    with pytest.warns(UnmeasuredSkipsWarning, match="measured at 48x32"):
        pipe("a fox", skip="auto", height=32, width=32, **OPTIONS)
    with pytest.raises(UsageError, match=r"2 steps of 'euler'; it has those for 3 steps"):
        pipe("a fox", skip="auto", num_inference_steps=2, **OPTIONS)
    assert unmeasured(manifest, "euler", 3, 32, 48) == ()


@pytest.mark.parametrize(
    ("skip", "words"),
    [
        ([0], "first step has none before it"),
        ([3], "1 to 2 can be skipped"),
        ([-1], "1 to 2 can be skipped"),
        ([1.5], "must be an integer"),
        ([True], "must be an integer"),
        ("often", "'none', 'auto' or a list"),
        (2, "'none', 'auto' or a list"),
        (None, "'none', 'auto' or a list"),
        (Skips((1,), 3), "order of `skip`"),
    ],
)
def test_skips_that_cannot_be_are_refused(pipe: FluxPipeline, skip: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_skip(skip, pipe.bundle.manifest, "euler", 3, True)


def test_samplers_of_several_evaluations_skip_nothing(pipe: FluxPipeline) -> None:
    for name in ("heun", "midpoint", "rk4"):
        with pytest.raises(UsageError, match="several times a step"):
            check_skip([1], pipe.bundle.manifest, name, 3, True)


@pytest.mark.parametrize(
    ("sigmas", "steps", "words"),
    [
        ([], None, "must be a list"),
        ("1, 0.5", None, "must be a list"),
        ([[1.0], [0.5]], None, "must be a list"),
        ([1.0, "0.5"], None, "must be a list"),
        ([1.0, 0.5, 0.0], None, "0 at the end is put there by itself"),
        ([1.1, 0.5], None, "at most 1"),
        ([1.0, float("nan")], None, "above 0"),
        ([0.5, 0.5], None, "below the one before"),
        ([0.5, 0.7], None, "below the one before"),
        ([1.0, 0.5], 3, "Leave out one of them"),
    ],
)
def test_noise_levels_that_cannot_be_are_refused(sigmas: Any, steps: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_sigmas(sigmas, steps)


def test_as_many_steps_are_made_as_there_are_sigmas(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    even = pipe("a fox", num_inference_steps=4, **OPTIONS).images
    own = pipe("a fox", sigmas=[1.0, 0.75, 0.5, 0.25], **OPTIONS).images
    np.testing.assert_array_equal(own, even)
    engines["transformer"].runs.clear()
    other = pipe("a fox", sigmas=[1.0, 0.4], **OPTIONS).images
    assert len(engines["transformer"].runs) == 2
    assert np.abs(np.asarray(other) - np.asarray(even)).max() > 0
