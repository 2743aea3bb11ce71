"""Each sampler against a field with a known solution, and against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fluxdeploy.host.loop import denoise
from fluxdeploy.sampling.sampler import load_sampler, sampler_names

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "ab2": 2, "dpmpp_2m": 2, "rk4": 4}


def ends_at(name: str, sigmas: Any) -> float:
    """Where x = 1 at sigmas[0] ends along dx/dsigma = (1 + 2 sigma) x / 2, in doubles."""
    sampler: Any = load_sampler(name)
    levels = sampler.levels(sigmas)
    latents: Any = np.ones((1, 1, 1))
    denoise(sampler, latents, sigmas, lambda level, x: (0.5 + levels[level]) * x)
    return float(latents[0, 0, 0])


def error(name: str, steps: int, first: float, last: float) -> float:
    sigmas = np.linspace(first, last, steps + 1)
    exact = np.exp((last + last**2 - first - first**2) / 2)
    return abs(ends_at(name, sigmas) - exact)


def test_the_samplers_are_those_with_a_known_order() -> None:
    assert set(sampler_names()) == set(ORDERS)


@pytest.mark.parametrize("name", ORDERS)
def test_each_sampler_has_its_order(name: str) -> None:
    many = 16 if ORDERS[name] == 4 else 128
    falls = error(name, many, 0.9, 0.1) / error(name, 2 * many, 0.9, 0.1)
    assert np.log2(falls) == pytest.approx(ORDERS[name], abs=0.25)


@pytest.mark.parametrize("name", sorted(ORDERS.keys() - {"dpmpp_2m"}))
def test_the_order_holds_from_noise_to_picture(name: str) -> None:
    many = 16 if ORDERS[name] == 4 else 128
    falls = error(name, many, 1, 0) / error(name, 2 * many, 1, 0)
    assert np.log2(falls) == pytest.approx(ORDERS[name], abs=0.3)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_velocity_is_taken_as_often_as_said_and_never_at_level_zero(
    name: str, steps: int
) -> None:
    sampler = load_sampler(name)
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    levels, seen = sampler.levels(sigmas), []
    assert levels.dtype == np.float32
    assert levels.min() > 0
    assert set(sigmas[:-1]) <= set(levels)

    def velocity(level: int, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(level)
        return -latents

    latents = np.ones((1, 2, 3), np.float32)
    denoise(sampler, latents, sigmas, velocity)
    assert len(seen) == sampler.evaluations(steps)
    assert set(seen) == set(range(len(levels)))


@pytest.mark.parametrize("name", ORDERS)
def test_levels_that_float32_cannot_tell_apart_change_nothing(name: str) -> None:
    sampler = load_sampler(name)
    sigmas = np.array([1, 1, 0.9, 0.9, 0.9, 0.4, 0], np.float32)
    levels = sampler.levels(sigmas)
    latents = np.ones((1, 1, 1), np.float32)
    denoise(sampler, latents, sigmas, lambda level, x: (0.5 + levels[level]) * x)
    # Euler's few steps go the furthest from e^-1.
    assert 0 < latents[0, 0, 0] < 0.5


def field(level: Any, latents: Any) -> Any:
    """A smooth velocity that looks at both; of arrays and of tensors."""
    return latents * (0.3 + level) - level * level


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_dpmpp_2m_is_that_of_diffusers(steps: int) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.numpy()
    expected = torch.linspace(-1, 1, 12).reshape(1, 4, 3)
    latents = expected.numpy().copy()
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = field(float(sigmas[step]), expected)
        expected = scheduler.step(velocity, timestep, expected).prev_sample
    sampler = load_sampler("dpmpp_2m")
    denoise(sampler, latents, sigmas, lambda level, x: field(float(sigmas[level]), x))
    np.testing.assert_allclose(latents, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_heun_is_that_of_diffusers(steps: int) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    expected = torch.linspace(-1, 1, 12).reshape(1, 4, 3)
    latents = expected.numpy().copy()
    for timestep in scheduler.timesteps:
        velocity = field(float(timestep) / 1000, expected)
        expected = scheduler.step(velocity, timestep, expected).prev_sample
    sigmas = np.append(scheduler.sigmas.numpy()[:-1:2], np.float32(0))
    sampler = load_sampler("heun")
    levels = sampler.levels(sigmas)
    denoise(sampler, latents, sigmas, lambda level, x: field(float(levels[level]), x))
    # diffusers goes through x - sigma v and back, in float32.
    np.testing.assert_allclose(latents, expected.numpy(), atol=1e-5)
