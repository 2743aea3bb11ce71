from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import ScheduleSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.schedule import shift_exponent, sigmas

KINDS: dict[str, dict[str, Any]] = {
    "dev": {},
    "schnell": {"use_dynamic_shifting": False, "shift": 1.0},
    "constant": {"use_dynamic_shifting": False, "shift": 3.0},
    "linear": {"time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
    "terminal_constant": {"use_dynamic_shifting": False, "shift_terminal": 0.02},
    "terminal_zero": {"shift_terminal": 0.0},
    "karras": {"spacing": "karras"},
    "exponential": {"spacing": "exponential", "use_dynamic_shifting": False, "shift": 3.0},
    "other_lengths": {"base_image_seq_len": 64, "max_image_seq_len": 1024, "max_shift": 0.9},
}


def config(spec: ScheduleSpec) -> dict[str, Any]:
    """What diffusers' scheduler takes for it."""
    found = dataclasses.asdict(spec)
    spacing = found.pop("spacing")
    return found if spacing is None else {**found, f"use_{spacing}_sigmas": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 28, 50, 1000])
@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 16384])
def test_levels_are_bit_equal_to_diffusers(
    schedule_spec: ScheduleSpec, kind: str, steps: int, tokens: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux import pipeline_flux

    spec = dataclasses.replace(schedule_spec, **KINDS[kind])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config(spec))
    mu = pipeline_flux.calculate_shift(
        tokens, spec.base_image_seq_len, spec.max_image_seq_len, spec.base_shift, spec.max_shift
    )
    assert shift_exponent(spec, tokens) == mu
    pipeline_flux.retrieve_timesteps(
        scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu
    )
    levels = sigmas(spec, steps, tokens)
    assert levels.dtype == np.float32
    np.testing.assert_array_equal(levels, scheduler.sigmas.numpy())


@pytest.mark.parametrize("kind", ["dev", "constant", "terminal", "karras"])
def test_the_callers_levels_are_shifted_as_in_diffusers(
    schedule_spec: ScheduleSpec, kind: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    spec, own = dataclasses.replace(schedule_spec, **KINDS[kind]), [1.0, 0.7, 0.35, 0.1]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config(spec))
    scheduler.set_timesteps(sigmas=own, mu=shift_exponent(spec, 1024))
    found = sigmas(spec, np.array(own, np.float32), 1024)
    np.testing.assert_array_equal(found, scheduler.sigmas.numpy())


def test_beta_spacing_has_the_quantiles_of_the_distribution(schedule_spec: ScheduleSpec) -> None:
    mpmath = pytest.importorskip("mpmath")
    kind = {"use_dynamic_shifting": False, "shift": 1.0, "spacing": "beta"}
    levels = sigmas(dataclasses.replace(schedule_spec, **kind), 9, 4096).astype(np.float64)
    shares = (levels[:-1] - levels[-2]) / (levels[0] - levels[-2])
    reached = [float(mpmath.betainc(0.6, 0.6, 0, x, regularized=True)) for x in shares]
    np.testing.assert_allclose(reached, np.linspace(1, 0, 9), atol=1e-6)


def test_levels_at_4096_are_finite_and_fall(schedule_spec: ScheduleSpec) -> None:
    assert (np.diff(sigmas(schedule_spec, 28, 256 * 256)) < 0).all()


def test_a_size_at_which_all_levels_are_one_is_refused(schedule_spec: ScheduleSpec) -> None:
    with pytest.raises(UsageError, match="all of the 28 levels are 1"):
        sigmas(schedule_spec, 28, 512 * 512)


def test_known_levels_of_four_steps_at_1024(schedule_spec: ScheduleSpec) -> None:
    expected = [1, 0.90453076, 0.75951093, 0.51284415, 0]
    np.testing.assert_allclose(sigmas(schedule_spec, 4, 4096), expected, rtol=1e-6)


@pytest.mark.parametrize(("side", "mu"), [(512, 0.63), (1024, 1.15), (2048, 3.23)])
def test_known_shift_exponents(schedule_spec: ScheduleSpec, side: int, mu: float) -> None:
    assert shift_exponent(schedule_spec, (side // 16) ** 2) == pytest.approx(mu, abs=5e-3)


def test_one_unshifted_step_goes_from_noise_to_picture(schedule_spec: ScheduleSpec) -> None:
    for kind in ("dev", "schnell", "linear"):
        spec = dataclasses.replace(schedule_spec, **KINDS[kind])
        np.testing.assert_array_equal(sigmas(spec, 1, 4096), [1, 0])


@pytest.mark.parametrize("steps", [0, -3, 10**9, 10**30, 2.0, True, None, "4", [4]])
def test_numbers_of_steps_that_cannot_be_are_refused(
    schedule_spec: ScheduleSpec, steps: Any
) -> None:
    with pytest.raises(UsageError, match=r"must be (from 1 to|an integer)"):
        sigmas(schedule_spec, steps, 4096)


@pytest.mark.parametrize(
    ("kind", "max_shift", "tokens"),
    [
        ("exponential", 1.15, 10**6),
        ("exponential", 80.0, 8192),
        ("exponential", -80.0, 8192),
        ("linear", -0.1, 4096),
        ("linear", 0.0, 4096),
    ],
)
def test_a_size_whose_shift_makes_no_levels_is_refused(
    schedule_spec: ScheduleSpec, kind: str, max_shift: float, tokens: int
) -> None:
    spec = dataclasses.replace(schedule_spec, time_shift_type=kind, max_shift=max_shift)
    with pytest.raises(UsageError, match="makes no noise levels for a picture of this size"):
        sigmas(spec, 4, tokens)


def test_one_step_is_refused_where_it_cannot_reach_the_terminal_level(
    schedule_spec: ScheduleSpec,
) -> None:
    with pytest.raises(UsageError, match="must be at least 2"):
        sigmas(dataclasses.replace(schedule_spec, shift_terminal=0.1), 1, 4096)
