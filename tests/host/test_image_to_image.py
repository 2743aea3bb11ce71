"""Image to image on engines in memory: what they are asked for, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.base import Array
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    Manifest,
)
from fluxdeploy.errors import Cancelled, NumericError, UnusedArgumentWarning, UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.schedule import sigmas
from tests.host.conftest import COMPONENTS, CharacterTokenizers, MemoryEngine

Engines = dict[str, MemoryEngine]


def vae_encoder(inputs: Mapping[str, Array]) -> dict[str, Array]:
    images: Any = inputs["images"]
    small = images[:, :, 4::8, 4::8]
    mean = np.tile(small, (1, 6, 1, 1))[:, :16] * np.arange(1, 17)[:, None, None]
    return {"mean": mean.astype(np.float32), "logvar": np.full_like(mean, -2, np.float32)}


WITH_ENCODER = {**COMPONENTS, "vae_encoder": vae_encoder}


@pytest.fixture
def manifest(manifest: Manifest) -> Manifest:
    engine = EngineRecord("memory", "1", "cpu", "", {})
    record = ComponentRecord("", "fp32", "fp32", (), (), (), (engine,), None)
    return dataclasses.replace(manifest, components=dict.fromkeys(WITH_ENCODER, record))


@pytest.fixture
def engines(engines: Engines) -> Engines:
    return {**engines, "vae_encoder": MemoryEngine("vae_encoder", vae_encoder)}


def image(height: int = 32, width: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture(pipe: FluxPipeline, given: Any, **options: Any) -> np.ndarray:
    options = {"prompt": "a fox", "seed": 3, "max_sequence_length": 16, **options}
    images = pipe(image=given, output_type="np", **options).images
    assert isinstance(images, np.ndarray)
    return images


def test_a_share_of_the_steps_is_made(
    pipe: FluxPipeline, engines: Engines, manifest: Manifest
) -> None:
    timesteps: list[Array] = []
    compute = engines["conditioner"].compute

    def conditioner(inputs: Mapping[str, Array]) -> dict[str, Array]:
        timesteps.append(inputs["timestep"])
        return compute(inputs)

    engines["conditioner"].compute = conditioner
    picture(pipe, image(), num_inference_steps=5, strength=0.5)
    np.testing.assert_array_equal(timesteps, [sigmas(manifest.schedule, 5, 6)[2:5]])
    assert len(engines["transformer"].runs) == 3
    assert engines["vae_encoder"].runs == [{"images": (1, 3, 32, 48)}]


@pytest.mark.parametrize(
    "change", [{"strength": 0.4}, {"seed": 4}, {"given": image(seed=1)}, {"prompt": "a hen"}]
)
def test_any_change_gives_another_picture(pipe: FluxPipeline, change: dict[str, Any]) -> None:
    call: dict[str, Any] = {"given": image(), "num_inference_steps": 5}
    first = picture(pipe, **call)
    np.testing.assert_array_equal(picture(pipe, **call), first)
    assert np.abs(picture(pipe, **{**call, **change}) - first).max() > 1 / 255


def test_bytes_in_an_array_are_the_picture_they_are_of(pipe: FluxPipeline) -> None:
    given = image(80, 60)
    expected = picture(pipe, given)
    np.testing.assert_array_equal(picture(pipe, np.asarray(given)), expected)
    np.testing.assert_array_equal(picture(pipe, [np.asarray(given)[None]]), expected)


def test_images_of_several_sizes_are_encoded_one_by_one(
    pipe: FluxPipeline, engines: Engines
) -> None:
    images = [image(30, 20), np.asarray(image(64, 64, 1), np.float32) / 255]
    both = picture(pipe, images, prompt=["a fox", "a hen"])
    assert both.shape == (2, 32, 48, 3)
    assert engines["vae_encoder"].runs == [{"images": (1, 3, 32, 48)}] * 2


def test_16_bits_keep_the_high_ones() -> None:
    from fluxdeploy.host.input_images import to_pixels

    values = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16)
    grey = to_pixels(Image.fromarray(values * 257), 16, 16)
    np.testing.assert_array_equal(grey, to_pixels(Image.fromarray(values.astype("u1")), 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": object()}, r"`image` holds .*object.*Give a PIL image"),
        ({"image": []}, "`image` is an empty list"),
        ({"image": "fox.png"}, "`image` holds 'fox.png'"),
        ({"image": np.zeros((32, 48), np.float32)}, r"`image` holds an array \[32, 48\]"),
        ({"image": np.zeros((32, 48, 4), np.float32)}, r"`image` holds an array \[32, 48, 4\]"),
        ({"image": np.zeros((0, 48, 3), np.float32)}, "without pixels"),
        ({"image": np.zeros((32, 48, 3), np.int64)}, "array of int64"),
        ({"image": np.full((32, 48, 3), 1.5)}, "outside 0 to 1"),
        ({"image": np.full((32, 48, 3), -0.5)}, "outside 0 to 1"),
        ({"image": np.full((32, 48, 3), np.nan)}, "outside 0 to 1"),
        ({"image": Image.new("F", (32, 48))}, "mode 'F' has no known range"),
        ({"image": Image.new("1", (8193, 8193))}, "more than 8192 x 8192 pixels"),
        ({"image": [image(), image()]}, "2 images for 1 pictures"),
        ({"image": [image()] * 2, "num_images_per_prompt": 3}, "2 images for 3 pictures"),
        ({"strength": 1.01}, "`strength` is 1.01; it must be from 0 to 1"),
        ({"strength": -0.1}, "`strength` is -0.1; it must be from 0 to 1"),
        ({"strength": float("nan")}, "`strength` must be a finite number"),
        ({"strength": "1"}, "`strength` must be a finite number"),
        ({"strength": 0}, "At strength 0 none of 3 steps is left"),
        ({"height": 40}, "multiples of 16"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    pipe: FluxPipeline, engines: Engines, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**{"prompt": "a fox", "image": image(), **options})
    assert not any(engine.runs for engine in engines.values())


def test_the_encoders_range_is_checked(pipe: FluxPipeline, engines: Engines) -> None:
    engines["vae_encoder"].dimensions = {"W": DimensionRange(64, 64, 128)}
    with pytest.raises(UsageError, match=r"vae_encoder takes 64 to 128 columns of pixels"):
        picture(pipe, image())
    assert not engines["vae_encoder"].runs


def test_the_conditioners_range_is_of_the_steps_that_are_made(
    pipe: FluxPipeline, engines: Engines
) -> None:
    engines["conditioner"].dimensions = {"N": DimensionRange(1, 2, 2)}
    assert picture(pipe, image(), num_inference_steps=4, strength=0.5).shape == (1, 32, 48, 3)
    with pytest.raises(UsageError, match="conditioner takes 1 to 2 steps"):
        picture(pipe, image(), num_inference_steps=4, strength=0.6)


def test_a_bundle_without_an_encoder_says_so(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest
) -> None:
    few = {name: manifest.components[name] for name in COMPONENTS}
    pipe = make_pipeline(dataclasses.replace(manifest, components=few))
    with pytest.raises(UsageError, match="no vae_encoder, which image to image takes"):
        picture(pipe, image())
    assert pipe("a fox", seed=1, max_sequence_length=16).seed == 1


@pytest.mark.parametrize("output", ["mean", "logvar"])
def test_an_encoder_that_gives_nan_is_named(
    pipe: FluxPipeline, engines: Engines, output: str
) -> None:
    def spoiled(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = vae_encoder(inputs)
        outputs[output][0, 0, 0, 0] = np.nan
        return outputs

    engines["vae_encoder"].compute = spoiled
    with pytest.raises(NumericError, match="The vae_encoder gave NaN"):
        picture(pipe, image())


def test_cancelling_is_seen_between_images(pipe: FluxPipeline, engines: Engines) -> None:
    token = CancelToken()

    def cancelling(inputs: Mapping[str, Array]) -> dict[str, Array]:
        token.cancel()
        return vae_encoder(inputs)

    engines["vae_encoder"].compute = cancelling
    with pytest.raises(Cancelled, match="before the vae_encoder ran"):
        picture(pipe, [image(), image()], num_images_per_prompt=2, cancel=token)
    assert len(engines["vae_encoder"].runs) == 1


@pytest.mark.parametrize(("steps", "strength"), [(3, 1.0), (1, 0.6), (28, 0.99)])
def test_an_image_that_becomes_noise_is_told(
    pipe: FluxPipeline, steps: int, strength: float
) -> None:
    call: dict[str, Any] = {"num_inference_steps": steps, "strength": strength}
    with pytest.warns(UnusedArgumentWarning, match="`image` does nothing: at strength"):
        first = picture(pipe, image(), **call)
    np.testing.assert_array_equal(picture(pipe, image(seed=1), **call), first)


def test_low_vram_has_the_encoder_first_and_alone(manifest: Manifest) -> None:
    events: list[str] = []

    def open_component(name: str) -> MemoryEngine:
        events.append(f"+{name}")
        engine = MemoryEngine(name, WITH_ENCODER[name])
        engine.close = lambda: events.append(f"-{name}")  # type: ignore[method-assign]
        return engine

    bundle = SimpleNamespace(manifest=manifest)
    pipe = FluxPipeline(bundle, CharacterTokenizers(), open_component, low_vram=True)  # type: ignore[arg-type]
    picture(pipe, image())
    assert events == [
        *("+vae_encoder", "-vae_encoder"),
        *("+clip", "+t5", "+conditioner", "-clip", "-t5", "-conditioner"),
        *("+transformer", "-transformer", "+vae_decoder", "-vae_decoder"),
    ]
