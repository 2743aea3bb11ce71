from __future__ import annotations

import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest

from engines.base import Array, Binding, Engine
from fluxdeploy.bundle.manifest import ScheduleSpec
from fluxdeploy.errors import Cancelled, NumericError, UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.finite import check_finite
from fluxdeploy.host.loop import denoise
from fluxdeploy.host.prompts import Condition
from fluxdeploy.host.velocity import HiddenStates, ModulatedTransformer
from fluxdeploy.sampling import euler
from fluxdeploy.sampling.schedule import sigmas


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def levels(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class ReusingEngine(Engine):
    """v = scale * (x - modulation[:, 0]), written over the previous outputs as engines may do."""

    def __init__(self, scale: float) -> None:
        super().__init__("transformer", (), (), {})
        self.scale = np.float32(scale)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return ReusingBinding(self.scale)

    def close(self) -> None:
        pass


class ReusingBinding(Binding):
    def __init__(self, scale: np.float32) -> None:
        self.scale = scale
        self.velocity: np.ndarray | None = None

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self.velocity is None:
            self.velocity = np.empty_like(inputs["hidden_states"])
        np.subtract(inputs["hidden_states"], inputs["modulation"][:, :1], out=self.velocity)
        np.multiply(self.velocity, self.scale, out=self.velocity)
        return {"velocity": self.velocity}


def transformer(scale: float, modulation: np.ndarray, rows: list[int]) -> ModulatedTransformer:
    """The velocity of pictures with the prompts of `rows`."""
    context = np.zeros((modulation.shape[1], 1, 1), np.float32)
    condition = Condition(context, modulation, np.array(rows))
    hidden = HiddenStates((len(rows), 6, 4))
    return ModulatedTransformer(ReusingEngine(scale), condition, {}, hidden, CancelToken())


def test_a_straight_path_ends_at_the_picture_in_any_number_of_steps() -> None:
    start, picture = noise(2, 6, 4), np.flip(noise(2, 6, 4))
    for values in [(1, 0), (1, 0.75, 0.5, 0.25, 0), (1, 0.9, 0.1, 0)]:
        latents = start.copy()
        denoise(euler, latents, levels(*values), lambda step, x: start - picture)
        np.testing.assert_allclose(latents, picture, atol=1e-6)


def test_a_linear_field_gives_the_product_of_eulers_steps() -> None:
    start = noise(1, 5, 4)
    latents = start.copy()
    # dx/dsigma = 3x: every step multiplies by 1 + 3 * (difference of levels).
    denoise(euler, latents, levels(1, 0.6, 0.25, 0), lambda step, x: 3 * x)
    np.testing.assert_allclose(latents, start * (-0.2 * -0.05 * 0.25), rtol=1e-4)


@pytest.mark.parametrize("true_cfg_scale", [None, 1.5, 4.0])
def test_steps_are_bit_equal_to_diffusers(
    schedule_spec: ScheduleSpec, true_cfg_scale: float | None
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    def positive(step: int, x: np.ndarray) -> np.ndarray:
        return x * np.float32(0.3) + np.float32(step)

    def negative(step: int, x: np.ndarray) -> np.ndarray:
        return x * np.float32(-0.7) - np.float32(1)

    steps = 5
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.15)
    expected = torch.from_numpy(noise(2, 9, 64))
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.from_numpy(positive(step, expected.numpy()))
        if true_cfg_scale is not None:
            away = torch.from_numpy(negative(step, expected.numpy()))
            velocity = away + true_cfg_scale * (velocity - away)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]

    latents = noise(2, 9, 64)
    denoise(
        euler,
        latents,
        sigmas(schedule_spec, steps, 4096),
        positive,
        negative=None if true_cfg_scale is None else negative,
        true_cfg_scale=1.0 if true_cfg_scale is None else true_cfg_scale,
    )
    np.testing.assert_array_equal(latents, expected.numpy())


@pytest.mark.parametrize("rows", [[0, 0, 1], [0, 1], [1, 0]], ids=str)
def test_the_transformer_gets_each_pictures_modulation_at_each_step(rows: list[int]) -> None:
    modulation = noise(3, 2, 5, 4)
    shape = (len(rows), 6, 4)
    start = noise(*shape)
    expected = start.astype(np.float64)
    for step, difference in enumerate([-0.5, -0.25, -0.25]):
        target = modulation[step, :, 0][rows][:, None]
        expected += difference * 0.5 * (expected - target)
    latents = start.copy()
    denoise(euler, latents, levels(1, 0.5, 0.25, 0), transformer(0.5, modulation, rows))
    np.testing.assert_allclose(latents, expected, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_the_loop_allocates_nothing_that_grows_with_the_picture(guided: bool) -> None:
    shape, steps = (1, 4096, 64), 4
    latents = noise(*shape)
    modulation = noise(steps, 1, 3, 64)
    velocity, negative = transformer(0.5, modulation, [0]), transformer(0.3, modulation, [0])
    started: list[int] = []

    def watch(step: int, x: np.ndarray) -> None:
        if step == 0:
            tracemalloc.reset_peak()
            started.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        denoise(
            euler,
            latents,
            sigmas_of(steps),
            velocity,
            negative=negative if guided else None,
            true_cfg_scale=3.0,
            on_step_end=watch,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # NumPy's own buffer of 8192 values is allowed; one temporary like the latents is a megabyte.
    assert peak - started[0] < 100_000


def sigmas_of(steps: int) -> np.ndarray:
    return np.linspace(1, 0, steps + 1, dtype=np.float32)


def test_the_callback_sees_every_step_and_may_replace_the_latents() -> None:
    seen: list[tuple[int, float]] = []

    def callback(step: int, x: np.ndarray) -> np.ndarray | None:
        seen.append((step, float(x[0, 0, 0])))
        return np.full_like(x, 10) if step == 1 else None

    latents = np.zeros((1, 2, 4), np.float32)
    denoise(
        euler,
        latents,
        levels(1, 0.5, 0.25, 0),
        lambda step, x: np.ones_like(x),
        on_step_end=callback,
    )
    assert seen == [(0, -0.5), (1, -0.75), (2, 9.75)]
    np.testing.assert_array_equal(latents, 9.75)


def test_a_callback_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[1, 3\]; they must keep the shape \[1, 2, 4\]"):
        denoise(
            euler,
            noise(1, 2, 4),
            levels(1, 0),
            lambda step, x: x,
            on_step_end=lambda step, x: np.zeros((1, 3), np.float32),
        )


def test_a_callback_that_leaves_nan_is_named() -> None:
    def spoil(step: int, x: np.ndarray) -> None:
        x[0, 0, 0] = np.nan

    with pytest.raises(NumericError, match="callback_on_step_end left NaN"):
        denoise(euler, noise(1, 2, 4), levels(1, 0), lambda step, x: x, on_step_end=spoil)


def test_cancelling_stops_before_the_next_step() -> None:
    token, calls = CancelToken(), []

    def velocity(step: int, x: np.ndarray) -> np.ndarray:
        calls.append(step)
        if step == 1:
            token.cancel()
        return x

    with pytest.raises(Cancelled, match="after 2 of 4 steps"):
        denoise(euler, noise(1, 2, 4), sigmas_of(4), velocity, cancel=token)
    assert calls == [0, 1]


def test_a_cancelled_loop_makes_no_step() -> None:
    token, calls = CancelToken(), []
    token.cancel()
    with pytest.raises(Cancelled, match="after 0 of 4 steps"):
        denoise(euler, noise(1, 2, 4), sigmas_of(4), lambda step, x: calls.append(1), cancel=token)
    assert calls == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("branch", ["positive", "negative"])
def test_a_non_finite_velocity_stops_with_component_and_step(bad: float, branch: str) -> None:
    def spoiled(step: int, x: np.ndarray) -> np.ndarray:
        velocity = np.ones_like(x)
        if step == 2:
            velocity[0, 1, 3] = bad
        return velocity

    def clean(step: int, x: np.ndarray) -> np.ndarray:
        return np.ones_like(x)

    pair = (spoiled, clean) if branch == "positive" else (clean, spoiled)
    with pytest.raises(NumericError, match="transformer gave NaN or infinity at step 3 of 4"):
        denoise(euler, noise(1, 2, 4), sigmas_of(4), pair[0], negative=pair[1], true_cfg_scale=2.0)


def test_large_finite_values_raise_no_false_alarm() -> None:
    # Their squares and their sum overflow float32.
    check_finite(np.full((64, 64), 3e38, np.float32), "transformer")
    with pytest.raises(NumericError, match=r"The t5 gave NaN or infinity\. "):
        check_finite(np.array([3e38, np.nan], np.float32), "t5")
