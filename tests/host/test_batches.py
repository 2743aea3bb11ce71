"""A batch that is larger than an engine takes is computed in parts, and nobody can tell."""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import EngineOptions, open_engine
from engines.base import Array
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import DimensionRange, Manifest
from fluxdeploy.errors import Cancelled, NumericError
from fluxdeploy.host.batches import divide, run_in_parts
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.text import load_tokenizers
from tests.host.conftest import COMPONENTS, MemoryEngine, conditioner

Engines = dict[str, MemoryEngine]

CALLS: dict[str, dict[str, Any]] = {
    "one prompt": {"prompt": "a fox", "num_images_per_prompt": 5},
    "one picture each": {"prompt": ["a", "b", "c", "d", "e"]},
    "several each": {"prompt": ["a", "b", "c"], "num_images_per_prompt": 2},
    "prompts that occur twice": {"prompt": ["a", "b", "a", "c", "b"]},
    "guided": {
        "prompt": ["a", "b", "c"],
        "negative_prompt": ["x", "y", "x"],
        "true_cfg_scale": 2.0,
        "num_images_per_prompt": 2,
    },
    "one negative prompt": {
        "prompt": ["a", "b", "c", "d", "e"],
        "negative_prompt": "x",
        "true_cfg_scale": 2.0,
    },
}


def limit(engines: Engines, most: int) -> None:
    for engine in engines.values():
        engine.dimensions = {"B": DimensionRange(1, 1, most)}


def draw(pipe: FluxPipeline, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The pictures, and the latents after each step."""
    steps: list[np.ndarray] = []
    images = pipe(
        **{"seed": 3, "max_sequence_length": 16, **options},
        output_type="np",
        callback_on_step_end=lambda pipe, step, timestep, state: steps.append(
            state["latents"].copy()
        ),
    ).images
    return np.asarray(images), steps


@pytest.mark.parametrize("most", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("name", CALLS)
def test_no_limit_changes_a_picture_or_a_step(
    pipe: FluxPipeline, engines: Engines, name: str, most: int
) -> None:
    whole, steps = draw(pipe, **CALLS[name])
    pipe._encoder.forget()
    limit(engines, most)
    for engine in engines.values():
        engine.runs.clear()
    parts, steps_of_parts = draw(pipe, **CALLS[name])
    np.testing.assert_array_equal(parts, whole)
    assert len(steps_of_parts) == len(steps) == 3
    np.testing.assert_array_equal(steps_of_parts, steps)
    sizes = [run["hidden_states"][0] for run in engines["transformer"].runs]
    assert max(sizes) <= most
    assert sum(sizes) == 3 * len(whole) * (2 if "true_cfg_scale" in CALLS[name] else 1)
    encoded = [run["input_ids"][0] for run in engines["t5"].runs]
    assert max(encoded) <= most


def test_every_engine_has_its_own_limit(pipe: FluxPipeline, engines: Engines) -> None:
    whole, _ = draw(pipe, **CALLS["guided"])
    pipe._encoder.forget()
    for engine, most in zip(engines.values(), (2, 1, 3, 4, 1), strict=True):
        engine.dimensions = {"B": DimensionRange(1, 1, most)}
    np.testing.assert_array_equal(draw(pipe, **CALLS["guided"])[0], whole)


def test_a_model_without_guidance_is_conditioned_in_parts_too(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest, engines: Engines
) -> None:
    pipe = make_pipeline(dataclasses.replace(manifest, guidance_embedding=False))
    whole, _ = draw(pipe, **CALLS["one picture each"])
    limit(engines, 2)
    np.testing.assert_array_equal(draw(pipe, **CALLS["one picture each"])[0], whole)


def test_an_engine_that_reuses_its_output_loses_no_part(
    pipe: FluxPipeline, engines: Engines
) -> None:
    """A binding writes the next part's velocity over the last one's."""
    whole, _ = draw(pipe, **CALLS["one prompt"])
    compute, buffer = engines["transformer"].compute, np.empty((1, 6, 64), np.float32)

    def reusing(inputs: Mapping[str, Array]) -> dict[str, Array]:
        np.copyto(buffer, compute(inputs)["velocity"])
        return {"velocity": buffer}

    engines["transformer"].compute = reusing
    limit(engines, 1)
    np.testing.assert_array_equal(draw(pipe, **CALLS["one prompt"])[0], whole)


@pytest.mark.parametrize("images", [1, 5])
def test_image_to_image_is_divided_alike(
    pipe: FluxPipeline, engines: Engines, images: int, manifest: Manifest
) -> None:
    def vae_encoder(inputs: Mapping[str, Array]) -> dict[str, Array]:
        mean = inputs["images"][:, :1, ::8, ::8].repeat(16, axis=1)
        return {"mean": mean, "logvar": np.zeros_like(mean)}

    engines["vae_encoder"] = MemoryEngine("vae_encoder", vae_encoder)
    manifest.components["vae_encoder"] = None  # type: ignore[index]
    given = np.random.default_rng(1).random((images, 32, 48, 3))
    options = {**CALLS["one prompt"], "image": list(given), "strength": 0.5}
    whole, _ = draw(pipe, **options)
    limit(engines, 2)
    np.testing.assert_array_equal(draw(pipe, **options)[0], whole)


def test_the_callers_latents_and_the_callbacks_are_those_of_the_whole(
    pipe: FluxPipeline, engines: Engines
) -> None:
    given = np.random.default_rng(1).standard_normal((5, 6, 64), np.float32)

    def flipped() -> np.ndarray:
        return np.asarray(
            pipe(
                **CALLS["one prompt"],
                latents=given,
                max_sequence_length=16,
                output_type="np",
                callback_on_step_end=lambda pipe, step, timestep, state: {
                    "latents": state["latents"][::-1]
                },
            ).images
        )

    whole = flipped()
    limit(engines, 2)
    np.testing.assert_array_equal(flipped(), whole)


def test_a_token_ends_a_step_between_its_parts(pipe: FluxPipeline, engines: Engines) -> None:
    limit(engines, 2)
    token, compute = CancelToken(), engines["transformer"].compute

    def cancelling(inputs: Mapping[str, Array]) -> dict[str, Array]:
        token.cancel()
        return compute(inputs)

    engines["transformer"].compute = cancelling
    with pytest.raises(Cancelled, match=r"^Cancelled in the middle of a step; no picture was made"):
        pipe(**CALLS["one prompt"], cancel=token)
    assert len(engines["transformer"].runs) == 1


def test_a_token_ends_an_encoder_between_its_parts(pipe: FluxPipeline, engines: Engines) -> None:
    limit(engines, 1)
    token, compute = CancelToken(), engines["t5"].compute

    def cancelling(inputs: Mapping[str, Array]) -> dict[str, Array]:
        token.cancel()
        return compute(inputs)

    engines["t5"].compute = cancelling
    with pytest.raises(Cancelled, match="before the t5 ran"):
        pipe(**CALLS["one picture each"], cancel=token)
    assert len(engines["t5"].runs) == 1


def test_what_is_not_finite_in_the_last_part_is_named(pipe: FluxPipeline, engines: Engines) -> None:
    limit(engines, 2)
    compute = engines["transformer"].compute

    def spoiled(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = compute(inputs)
        if len(inputs["hidden_states"]) == 1:
            outputs["velocity"][0, 0, 0] = np.nan
        return outputs

    engines["transformer"].compute = spoiled
    with pytest.raises(NumericError, match="transformer gave NaN or infinity at step 1 of 3"):
        pipe(**CALLS["one prompt"])


@pytest.mark.parametrize("prompts", [1, 40])
def test_memory_grows_with_the_latents_and_not_with_the_parts(
    pipe: FluxPipeline, engines: Engines, prompts: int
) -> None:
    """What is in place for a part is not there once for each of them."""
    bound: list[Mapping[str, Array]] = []
    bind = engines["transformer"].bind
    engines["transformer"].bind = lambda resident: bound.append(resident) or bind(resident)  # type: ignore[method-assign,func-returns-value]
    limit(engines, 1)
    texts = [f"fox {index}" for index in range(prompts)]
    pipe(texts, num_images_per_prompt=40 // prompts, seed=1, max_sequence_length=16)
    assert len(bound) == 1
    assert ("context" in bound[0]) == (prompts == 1)


def test_steps_of_parts_allocate_nothing_that_grows_with_the_batch(
    pipe: FluxPipeline, engines: Engines
) -> None:
    """Prompts are taken out of those of the whole call in buffers that are made once."""
    wide = 1 << 14

    def conditioned(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = conditioner(inputs)
        return {**outputs, "modulation": outputs["modulation"].repeat(wide // 8, axis=-1)}

    def still(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"velocity": velocity[: len(inputs["hidden_states"])]}

    velocity = np.zeros((2, 6, 64), np.float32)
    engines["conditioner"].compute, engines["transformer"].compute = conditioned, still
    limit(engines, 2)
    peaks = []

    def watch(*_: object) -> None:
        peaks.append(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        pipe(["a", "b"], num_images_per_prompt=2, seed=1, callback_on_step_end=watch)
    finally:
        tracemalloc.stop()
    (before, _), (_, peak), *_ = peaks
    assert peak - before < 3 * 4 * wide / 2


def test_parts_are_few_and_even() -> None:
    engine = MemoryEngine("clip", COMPONENTS["clip"])
    for most in range(1, 9):
        engine.dimensions = {"B": DimensionRange(1, 1, most)}
        for batch in range(1, 30):
            parts = divide(engine, batch)
            sizes = [part.stop - part.start for part in parts]
            assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
            assert len(parts) == -(-batch // most)
            assert max(sizes) - min(sizes) <= 1
    engine.dimensions = {}
    assert divide(engine, 1000) == [slice(0, 1000)]


def test_inputs_that_do_not_agree_on_a_batch_are_the_engines_to_refuse() -> None:
    """Divided by one of them, rows of the other would be lost without a word."""
    engine = MemoryEngine("conditioner", lambda inputs: {})
    engine.dimensions = {"B": DimensionRange(1, 1, 1)}
    inputs = {
        "text_embeddings": np.zeros((2, 1), np.float32),
        "pooled_embeddings": np.zeros((3, 1), np.float32),
    }
    run_in_parts(engine, inputs, lambda: None)
    assert engine.runs == [{"text_embeddings": (2, 1), "pooled_embeddings": (3, 1)}]


def limited(bundle: Bundle, most: int) -> Bundle:
    """A bundle whose engines take no more pictures or prompts."""
    components = {
        name: dataclasses.replace(
            record,
            engines=tuple(
                dataclasses.replace(
                    engine, dimensions={**engine.dimensions, "B": DimensionRange(1, 1, most)}
                )
                for engine in record.engines
            ),
        )
        for name, record in bundle.manifest.components.items()
    }
    return dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, components=components)
    )


@pytest.mark.parametrize("most", [1, 2, 3])
def test_real_engines_with_a_limit_draw_what_they_draw_without(
    demo_bundle: Path, five: tuple[np.ndarray, list[np.ndarray]], most: int
) -> None:
    images, steps = draw_five(limited(open_bundle(demo_bundle), most))
    # A processor may have other kernels for another number of rows, which round otherwise.
    np.testing.assert_allclose(steps, five[1], atol=1e-4)
    np.testing.assert_allclose(images, five[0], atol=1e-4)


@pytest.fixture(scope="module")
def five(demo_bundle: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Five pictures of the demo in one batch."""
    return draw_five(open_bundle(demo_bundle))


def draw_five(bundle: Bundle) -> tuple[np.ndarray, list[np.ndarray]]:
    open_component = functools.partial(open_engine, bundle, options=EngineOptions(threads=1))
    with FluxPipeline(bundle, load_tokenizers(bundle), open_component) as pipe:
        return draw(
            pipe,
            prompt=[f"a {colour} circle" for colour in ("red", "blue", "green", "pink", "cyan")],
            negative_prompt="a pink star",
            true_cfg_scale=2.0,
            height=64,
            width=64,
            num_inference_steps=2,
        )
