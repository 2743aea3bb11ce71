"""A sampler is one file: here one that the package does not ship."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fluxdeploy.sampling
from fluxdeploy.bundle.manifest import DimensionRange, Manifest
from fluxdeploy.errors import NumericError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.sampler import Sampler, load_sampler
from fluxdeploy.sampling.schedule import sigmas as schedule
from tests.host.conftest import MemoryEngine

FOLDER = Path(__file__).parents[1] / "support" / "samplers"


@pytest.fixture
def trapezoid(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sampler]:
    """A sampler of one file, as if it lay in the package."""
    package = fluxdeploy.sampling
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(FOLDER)])
    yield load_sampler("trapezoid")
    del sys.modules["fluxdeploy.sampling.trapezoid"]
    del package.trapezoid  # type: ignore[attr-defined]


@pytest.fixture
def own_pipe(trapezoid: Sampler, pipe: FluxPipeline) -> Callable[..., Any]:
    return functools.partial(pipe, sampler="trapezoid")


def test_the_conditioner_gets_the_levels_and_the_transformer_one_run_each(
    own_pipe: Callable[..., Any], engines: dict[str, MemoryEngine], manifest: Manifest
) -> None:
    compute, timesteps, modulations = engines["conditioner"].compute, [], []
    step = engines["transformer"].compute
    outputs = {}

    def conditioner(inputs):  # type: ignore[no-untyped-def]
        timesteps.append(inputs["timestep"].copy())
        outputs.update(compute(inputs))
        return outputs

    def transformer(inputs):  # type: ignore[no-untyped-def]
        modulations.append(inputs["modulation"].copy())
        return step(inputs)

    engines["conditioner"].compute = conditioner
    engines["transformer"].compute = transformer
    seen: list[tuple[int, float]] = []
    own_pipe(
        "a fox",
        seed=1,
        max_sequence_length=16,
        callback_on_step_end=lambda pipe, step, timestep, state: seen.append((step, timestep)),
    )
    sigmas = schedule(manifest.schedule, 3, 6)
    np.testing.assert_array_equal(timesteps, [sigmas])
    levels = [0, 1, 1, 2, 2, 3]
    np.testing.assert_array_equal(modulations, outputs["modulation"][levels])
    assert seen == [(index, float(1000 * sigmas[index])) for index in range(3)]


def test_the_checks_of_the_loop_hold_for_every_sampler(
    own_pipe: Callable[..., Any], engines: dict[str, MemoryEngine]
) -> None:
    engines["conditioner"].dimensions = {"N": DimensionRange(1, 3, 3)}
    with pytest.raises(UsageError, match=r"conditioner takes 1 to 3 steps .* not 4\."):
        own_pipe("a fox", seed=1, max_sequence_length=16)
    engines["conditioner"].dimensions = {}
    compute = engines["transformer"].compute

    def spoiled(inputs):  # type: ignore[no-untyped-def]
        outputs = compute(inputs)
        if len(engines["transformer"].runs) == 4:  # the second of step 2
            outputs["velocity"][0, 0, 0] = np.nan
        return outputs

    engines["transformer"].compute = spoiled
    with pytest.raises(NumericError, match="at step 2 of 3"):
        own_pipe("a fox", seed=1, max_sequence_length=16)


def test_guidance_away_from_a_prompt_works_with_every_sampler(own_pipe: Callable[..., Any]) -> None:
    options = {"seed": 1, "max_sequence_length": 16, "output_type": "np"}
    plain = np.asarray(own_pipe("a fox", **options).images)
    same = own_pipe("a fox", negative_prompt="a fox", true_cfg_scale=3.0, **options).images
    np.testing.assert_allclose(same, plain, atol=1e-6)
    other = own_pipe("a fox", negative_prompt="fog", true_cfg_scale=3.0, **options).images
    assert np.abs(np.asarray(other) - plain).max() > 0.1


@pytest.mark.parametrize("name", ["none", "latents", "sampler"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"no sampler '{name}'. Use one of 'euler', 'ab2', "):
        load_sampler(name)
