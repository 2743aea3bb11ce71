"""Previews: when they are shown, and that they show where the steps are going."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import Manifest, PreviewSpec
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.previews import Previews, preview_steps
from fluxdeploy.sampling.latents import unpack
from tests.host.conftest import MemoryEngine


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (0, 28, ()),
        (1, 28, (5,)),
        (3, 28, (5, 11, 16)),
        (3, 4, (1, 2, 3)),
        (3, 2, (1,)),
        (3, 1, ()),
        (10, 20, (4, 5, 6, 7, 8, 10, 11, 12, 13, 14)),
    ],
)
def test_previews_begin_after_a_fifth_of_the_steps(
    count: int, steps: int, expected: tuple[int, ...]
) -> None:
    assert preview_steps(count, steps) == expected


def test_a_preview_is_the_end_of_the_line_that_the_latest_step_was_on() -> None:
    """On a straight path from noise to a picture, each step points at the picture."""
    picture, noise = np.random.default_rng(0).standard_normal((2, 1, 6, 4)).astype(np.float32)
    sigmas = np.array([1, 0.9, 0.5, 0.1, 0], np.float32)
    seen: list[Any] = []
    previews = Previews((1, 3), sigmas, lambda x: x, lambda made, x: seen.append((made, x)))
    for step, (level, after) in enumerate(itertools.pairwise(sigmas)):
        previews.before_step(step, level * noise + (1 - level) * picture)
        previews.after_step(step, after * noise + (1 - after) * picture)
    assert [made for made, _ in seen] == [1, 3]
    for _, shown in seen:
        np.testing.assert_allclose(shown, picture, atol=1e-5)


def test_a_step_between_equal_levels_shows_what_is_there() -> None:
    latents = np.ones((1, 6, 4), np.float32)
    seen: list[Any] = []
    levels = np.array([1, 1, 0], np.float32)
    previews = Previews((1,), levels, lambda x: x, lambda made, x: seen.append(x))
    previews.before_step(0, latents)
    previews.after_step(0, latents)
    np.testing.assert_array_equal(seen, [latents])


def test_previews_change_no_picture_and_cost_a_decoding_each(pipe: FluxPipeline) -> None:
    seen: list[tuple[int, Any]] = []
    call: dict[str, Any] = {"seed": 3, "max_sequence_length": 16, "output_type": "np"}
    plain = pipe(["fox", "hen"], **call)
    watched = pipe(
        ["fox", "hen"],
        num_previews=2,
        callback_on_preview=lambda caller, steps, images: seen.append((steps, images)),
        **call,
    )
    np.testing.assert_array_equal(watched.images, plain.images)
    assert [steps for steps, _ in seen] == [1, 2]
    assert all(images.shape == np.shape(plain.images) for _, images in seen)
    assert set(watched.seconds) == {"queued", "encoding", "denoising", "decoding"}


def test_a_preview_looks_at_the_step_and_not_at_what_a_callback_made_of_it(
    pipe: FluxPipeline,
) -> None:
    """A callback that puts other latents in place moves the next preview along with them."""
    call: dict[str, Any] = {"seed": 3, "max_sequence_length": 16, "output_type": "np"}

    def seen(**more: Any) -> list[Any]:
        found: list[Any] = []
        pipe(
            "fox",
            num_previews=2,
            callback_on_preview=lambda caller, steps, images: found.append(images),
            **call,
            **more,
        )
        return found

    plain = seen()
    other = seen(
        callback_on_step_end=lambda caller, step, timestep, state: {
            "latents": state["latents"] + np.float32(step == 0)
        }
    )
    np.testing.assert_array_equal(plain[0], other[0])
    # Two latents that are one apart point at pictures that are about as far apart, not many times.
    assert np.abs(plain[1] - other[1]).max() < 0.5


def test_previews_that_nobody_takes_are_refused(pipe: FluxPipeline) -> None:
    with pytest.raises(UsageError, match="`num_previews` needs a `callback_on_preview`"):
        pipe("fox", num_previews=1)
    with pytest.raises(UsageError, match="`callback_on_preview` is 3, which cannot be called"):
        pipe("fox", callback_on_preview=3)  # type: ignore[arg-type]


MATRIX = np.random.RandomState(0).uniform(-0.2, 0.2, (16, 3))
BIAS = (0.5, 0.4, 0.6)


@pytest.fixture
def linear(make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest) -> FluxPipeline:
    """A pipeline of a bundle with a map from latents to colours."""
    preview = PreviewSpec(tuple(map(tuple, MATRIX)), BIAS)
    return make_pipeline(replace(manifest, preview=preview))


def test_linear_previews_show_each_step_without_the_decoder(
    linear: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    """The last one is of the latents that the picture is decoded from."""
    seen: list[tuple[int, Any]] = []
    call: dict[str, Any] = {"seed": 3, "max_sequence_length": 16, "output_type": "np"}
    plain = linear(["fox", "hen"], **call)
    engines["vae_decoder"].runs.clear()
    watched = linear(
        ["fox", "hen"],
        preview_decoder="linear",
        callback_on_preview=lambda caller, steps, images: seen.append((steps, images)),
        **call,
    )
    np.testing.assert_array_equal(watched.images, plain.images)
    assert len(engines["vae_decoder"].runs) == 2
    assert [steps for steps, _ in seen] == [1, 2, 3]
    tokens: Any = linear(["fox", "hen"], **{**call, "output_type": "latent"}).images
    latents = unpack(tokens, 32, 48, linear.bundle.manifest.latents)
    expected = np.clip(np.einsum("bchw,cr->bhwr", latents, MATRIX) + BIAS, 0, 1)
    assert expected.std() > 0.05
    np.testing.assert_allclose(seen[-1][1], expected, atol=1e-5)


def test_linear_previews_are_of_the_calls_output_type(linear: FluxPipeline) -> None:
    seen: list[Any] = []

    def watch(output_type: Any) -> Any:
        linear(
            "fox",
            seed=3,
            max_sequence_length=16,
            output_type=output_type,
            preview_decoder="linear",
            callback_on_preview=lambda caller, steps, images: seen.append(images),
        )
        return seen.pop()

    (picture,), pixels = watch("pil"), watch("np")
    assert picture.size == (6, 4)
    np.testing.assert_array_equal(np.asarray(picture), np.rint(pixels[0] * 255))
    assert watch("latent").shape == (1, 6, 64)


def test_an_old_bundle_says_what_linear_previews_take(pipe: FluxPipeline) -> None:
    with pytest.raises(UsageError, match=r"no map from latents to colours.*`fluxdeploy build`"):
        pipe("fox", preview_decoder="linear", callback_on_preview=print)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preview_decoder": "linear"}, "needs a `callback_on_preview`"),
        ({"preview_decoder": "tiny", "callback_on_preview": print}, "'tiny'. Use 'vae' or"),
        (
            {"preview_decoder": "linear", "callback_on_preview": print, "num_previews": 2},
            "`num_previews` has no say",
        ),
    ],
)
def test_preview_decoders_that_cannot_be_are_refused(
    linear: FluxPipeline, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        linear("fox", **arguments)
