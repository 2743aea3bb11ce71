from __future__ import annotations

import numpy as np
import pytest

from fluxdeploy.sampling.noising import first_step, scale_noise


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 28, 50])
def test_the_steps_of_a_strength_are_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxImg2ImgPipeline.__new__(diffusers.FluxImg2ImgPipeline)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    object.__setattr__(pipe, "scheduler", scheduler)
    for strength in (0.0, 0.01, 0.1, 0.3, 0.55, 0.6, 0.7, 0.95, 0.999, 1.0):
        timesteps, left = pipe.get_timesteps(steps, strength, "cpu")
        assert steps - first_step(steps, strength) == left == len(timesteps)


def test_noising_is_bit_equal_to_diffusers() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=1.15)
    random = np.random.default_rng(0)
    latents, noise = random.standard_normal((2, 2, 16, 6, 4), np.float32)
    for index in range(5):
        scheduler.set_begin_index(index)
        timestep = scheduler.timesteps[index : index + 1].repeat(2)
        expected = scheduler.scale_noise(
            torch.from_numpy(latents), timestep, torch.from_numpy(noise)
        )
        sigma = scheduler.sigmas.numpy()[index]
        found = scale_noise(latents, noise, sigma)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.numpy())
