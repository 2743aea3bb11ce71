from __future__ import annotations

import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    Manifest,
)
from fluxdeploy.errors import NumericError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.latents import pack
from fluxdeploy.sampling.noise import standard_normal
from tests.host.conftest import COMPONENTS, CharacterTokenizers, MemoryEngine

Engines = dict[str, Any]


def picture(pipe: FluxPipeline, prompt: Any = "a fox", **options: Any) -> np.ndarray:
    options = {"seed": 3, "max_sequence_length": 16, **options}
    images = pipe(prompt, output_type="np", **options).images
    assert isinstance(images, np.ndarray)
    return images


def test_the_call_has_the_documented_signature() -> None:
    parameters = inspect.signature(FluxPipeline.__call__).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "self": inspect.Parameter.empty,
        "prompt": None,
        "prompt_2": None,
        "negative_prompt": None,
        "negative_prompt_2": None,
        "true_cfg_scale": 1.0,
        "positional": inspect.Parameter.empty,
        "height": None,
        "width": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "num_images_per_prompt": 1,
        "seed": None,
        "latents": None,
        "prompt_embeds": None,
        "pooled_prompt_embeds": None,
        "negative_prompt_embeds": None,
        "negative_pooled_prompt_embeds": None,
        "redux_image": None,
        "prompt_embeds_scale": 1.0,
        "pooled_prompt_embeds_scale": 1.0,
        "image": None,
        "mask_image": None,
        "strength": None,
        "padding_mask_crop": None,
        "control_image": None,
        "control_mode": None,
        "controlnet_conditioning_scale": 1.0,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
        "ip_adapter_image": None,
        "ip_adapter_image_embeds": None,
        "negative_ip_adapter_image": None,
        "negative_ip_adapter_image_embeds": None,
        "ip_adapter_scale": 1.0,
        "max_area": None,
        "auto_resize": True,
        "max_sequence_length": None,
        "lora": None,
        "sampler": "euler",
        "sigmas": None,
        "skip": "none",
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ("latents",),
        "num_previews": 0,
        "callback_on_preview": None,
        "preview_decoder": "vae",
        "cancel": None,
        "priority": "normal",
        "output_type": "pil",
        "return_dict": True,
        "others": inspect.Parameter.empty,
    }


def test_the_bundles_defaults_fill_what_is_left_out(pipe: FluxPipeline, engines: Engines) -> None:
    left_out = picture(pipe)
    assert left_out.shape == (1, 32, 48, 3)
    assert left_out.dtype == np.float32
    assert len(engines["transformer"].runs) == 3
    spelled_out = picture(pipe, height=32, width=48, num_inference_steps=3, guidance_scale=3.5)
    np.testing.assert_array_equal(spelled_out, left_out)
    assert engines["t5"].runs[0] == {"input_ids": (1, 16)}
    assert engines["transformer"].runs[0] == {
        "hidden_states": (1, 6, 64),
        "context": (1, 16, 8),
        "modulation": (1, 3, 8),
        "rope_cos": (22, 128),
        "rope_sin": (22, 128),
    }


def test_pil_pictures_are_the_arrays_in_8_bits(pipe: FluxPipeline) -> None:
    arrays = picture(pipe, num_images_per_prompt=2)
    images = pipe("a fox", seed=3, num_images_per_prompt=2, max_sequence_length=16).images
    assert [image.size for image in images] == [(48, 32)] * 2
    for image, array in zip(images, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.rint(array * 255))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"prompt": "a hen"},
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"max_sequence_length": 17},
        {"negative_prompt": "", "true_cfg_scale": 2.0},
    ],
)
def test_the_same_call_gives_the_same_picture_and_any_change_another(
    pipe: FluxPipeline, change: dict[str, Any]
) -> None:
    first = picture(pipe)
    np.testing.assert_array_equal(picture(pipe), first)
    assert np.abs(picture(pipe, **change) - first).max() > 1 / 255


def test_a_drawn_seed_is_reported_and_makes_the_picture_again(pipe: FluxPipeline) -> None:
    output = pipe("a fox", output_type="np", max_sequence_length=16)
    assert output.seed is not None
    np.testing.assert_array_equal(picture(pipe, seed=output.seed), output.images)
    assert pipe("a fox", max_sequence_length=16).seed != output.seed


def test_pictures_of_one_prompt_stand_together(pipe: FluxPipeline, manifest: Manifest) -> None:
    prompts = ["a fox", "a hen"]
    together = picture(pipe, prompts, num_images_per_prompt=2)
    noise = pack(standard_normal((4, 16, 4, 6), 3), manifest.latents)
    for index, prompt in enumerate(["a fox", "a fox", "a hen", "a hen"]):
        alone = picture(pipe, prompt, latents=noise[index : index + 1])
        np.testing.assert_allclose(together[index], alone[0], atol=1e-6)


def test_a_prompt_that_occurs_twice_is_encoded_once(pipe: FluxPipeline, engines: Engines) -> None:
    images = picture(pipe, ["a fox", "a hen", "a fox"], negative_prompt="fog", true_cfg_scale=2.0)
    assert len(images) == 3
    assert [run["input_ids"][0] for run in engines["t5"].runs] == [2, 1]
    assert [run["timestep"] for run in engines["conditioner"].runs] == [(3,), (3,)]


def test_true_cfg_needs_a_scale_above_1_and_a_negative_prompt(
    pipe: FluxPipeline, engines: Engines
) -> None:
    plain = picture(pipe)
    np.testing.assert_array_equal(picture(pipe, negative_prompt="fog"), plain)
    np.testing.assert_array_equal(picture(pipe, true_cfg_scale=4.0), plain)
    assert len(engines["transformer"].runs) == 9
    guided = picture(pipe, negative_prompt=["fog"], true_cfg_scale=4.0)
    assert len(engines["transformer"].runs) == 15
    assert np.abs(guided - plain).max() > 0.1
    # With the prompt itself as the negative one, there is nothing to steer away from.
    np.testing.assert_allclose(
        picture(pipe, negative_prompt="a fox", true_cfg_scale=4.0), plain, atol=1e-6
    )


def test_without_a_guidance_embedding_the_guidance_is_ignored(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest, engines: Engines
) -> None:
    pipe = make_pipeline(dataclasses.replace(manifest, guidance_embedding=False))
    np.testing.assert_array_equal(picture(pipe, guidance_scale=9.0), picture(pipe))
    assert "guidance" not in engines["conditioner"].runs[0]


def test_own_latents_replace_the_seed_and_are_left_as_they_were(
    pipe: FluxPipeline, manifest: Manifest
) -> None:
    latents = pack(standard_normal((1, 16, 4, 6), 3), manifest.latents)
    before = latents.copy()
    output = pipe("a fox", latents=latents, output_type="np", max_sequence_length=16)
    assert output.seed is None
    np.testing.assert_array_equal(output.images, picture(pipe, seed=3))
    np.testing.assert_array_equal(latents, before)


def test_the_callback_gets_each_step_and_may_replace_the_latents(
    pipe: FluxPipeline, manifest: Manifest
) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def watch(
        caller: FluxPipeline, step: int, timestep: float, state: dict[str, Any]
    ) -> Mapping[str, Any] | None:
        assert caller is pipe
        seen.append((step, timestep, state["latents"].shape))
        return {"latents": np.zeros_like(state["latents"])} if step == 2 else None

    images = picture(pipe, callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    assert all(900 > timestep > 300 for _, timestep, _ in seen[1:])
    assert {shape for _, _, shape in seen} == {(1, 6, 64)}
    # Zero latents decode to the shift alone.
    grey = np.tanh(manifest.latents.shift_factor / 3) / 2 + 0.5
    np.testing.assert_allclose(images, grey, atol=1e-6)


def test_a_callback_must_return_a_mapping(pipe: FluxPipeline) -> None:
    with pytest.raises(UsageError, match="returned a int"):
        picture(pipe, callback_on_step_end=lambda *arguments: 1)


def test_calls_from_several_threads_take_turns(pipe: FluxPipeline) -> None:
    running = threading.Semaphore(1)
    results: dict[int, np.ndarray] = {}

    def alone(caller: FluxPipeline, step: int, timestep: float, state: object) -> None:
        if step == 0:
            assert running.acquire(blocking=False)
            time.sleep(0.02)  # long enough for the others to break in
        if step == 2:
            running.release()

    def make(seed: int) -> None:
        results[seed] = picture(pipe, seed=seed, callback_on_step_end=alone)

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        np.testing.assert_array_equal(results[seed], picture(pipe, seed=seed))


@pytest.mark.parametrize(
    ("component", "output"),
    [
        ("clip", "pooled_embeddings"),
        ("t5", "text_embeddings"),
        ("conditioner", "context"),
        ("conditioner", "modulation"),
        ("transformer", "velocity"),
        ("vae_decoder", "images"),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_component_that_gives_nan_is_named(
    pipe: FluxPipeline, engines: Engines, component: str, output: str, bad: float
) -> None:
    compute = engines[component].compute

    def spoiled(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = compute(inputs)
        outputs[output].reshape(-1)[-1] = bad
        return outputs

    engines[component].compute = spoiled
    where = " at step 1 of 3" if component == "transformer" else ""
    with pytest.raises(NumericError, match=f"The {component} gave NaN or infinity{where}\\. "):
        picture(pipe)


@pytest.mark.parametrize(
    ("component", "symbol", "message"),
    [
        ("vae_decoder", "H", r"vae_decoder takes 8 to 9 rows of pixels \(height\), not 32\."),
        ("vae_decoder", "w", r"takes 8 to 9 columns of latents \(.*\), not 6\."),
        ("transformer", "L", r"takes 8 to 9 image tokens \(.*\), not 6\."),
        ("transformer", "T", r"takes 8 to 9 text and image tokens together, not 22\."),
        ("conditioner", "N", r"takes 8 to 9 steps \(num_inference_steps\), not 3\."),
        ("t5", "S", r"takes 8 to 9 text tokens \(max_sequence_length\), not 16\."),
    ],
)
def test_sizes_outside_an_engines_range_are_refused_before_anything_runs(
    pipe: FluxPipeline, engines: Engines, component: str, symbol: str, message: str
) -> None:
    engines[component].dimensions = {symbol: DimensionRange(8, 8, 9)}
    with pytest.raises(UsageError, match=message):
        picture(pipe, num_images_per_prompt=2)
    assert not any(engine.runs for engine in engines.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "`prompt` must be a string or a list of at least one string"),
        ({"prompt": None}, "Give a `prompt`, or `prompt_embeds` with"),
        ({"prompt": ["a", 1]}, "`prompt` must be a string"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 3}, "`negative_prompt` must be a string"),
        ({"height": 40}, "multiples of 16"),
        ({"width": 0}, "multiples of 16"),
        ({"height": 32.0}, "`height` must be an integer"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; it must be at least 1"),
        ({"num_inference_steps": True}, "`num_inference_steps` must be an integer"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0; it must be at least 1"),
        ({"max_sequence_length": 0}, "from 1 to 512"),
        ({"max_sequence_length": 513}, "`max_sequence_length` is 513; it must be from 1 to 512"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"true_cfg_scale": float("inf")}, "`true_cfg_scale` must be a finite number"),
        ({"true_cfg_scale": "2"}, "`true_cfg_scale` must be a finite number"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"latents": np.zeros((1, 5, 64))}, r"shape \[1, 5, 64\]; .* must be \[1, 6, 64\], packed"),
        ({"latents": np.full((1, 6, 64), np.nan)}, "NaN"),
        ({"mask_image": object()}, "`mask_image` has no place in text to image"),
        ({"cancel": object()}, "`cancel` must be a CancelToken, not object"),
        ({"output_type": "pt"}, "'pt' is unknown"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    pipe: FluxPipeline, engines: Engines, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**{"prompt": "a fox", **options})
    assert not any(engine.runs for engine in engines.values())


def test_the_bundles_tokenizer_may_allow_fewer_tokens(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest
) -> None:
    record = dataclasses.replace(manifest.tokenizers["t5"], max_length=256)
    pipe = make_pipeline(
        dataclasses.replace(manifest, tokenizers={**manifest.tokenizers, "t5": record})
    )
    with pytest.raises(UsageError, match="is 257; it must be from 1 to 256"):
        picture(pipe, max_sequence_length=257)


def test_the_empty_prompt_is_a_prompt(pipe: FluxPipeline) -> None:
    assert np.abs(picture(pipe, "") - picture(pipe)).max() > 1 / 255


def test_closing_frees_every_engine(pipe: FluxPipeline, engines: Engines) -> None:
    with pipe:
        picture(pipe)
    assert all(engine.closed for engine in engines.values())
    pipe.close()


def frugal(pipe: FluxPipeline, manifest: Manifest) -> tuple[FluxPipeline, list[str]]:
    """The pipeline with low_vram, on engines of its own; and what is opened and closed."""
    events: list[str] = []

    def open_component(name: str) -> MemoryEngine:
        engine = MemoryEngine(name, COMPONENTS[name])
        close = engine.close

        def closing() -> None:
            events.append(f"-{name}")
            close()

        engine.close = closing  # type: ignore[method-assign]
        events.append(f"+{name}")
        return engine

    sizes = {"S": DimensionRange(1, 16, 64)}
    records = {
        name: ComponentRecord(
            "", "fp32", "fp32", (), (), (), (EngineRecord("memory", "1", "cpu", "", sizes),), None
        )
        for name in COMPONENTS
    }
    bundle = SimpleNamespace(
        manifest=dataclasses.replace(manifest, components=records), root=None, content_hash=""
    )
    return FluxPipeline(bundle, CharacterTokenizers(), open_component, low_vram=True), events  # type: ignore[arg-type]


def test_low_vram_opens_engines_one_after_the_other(pipe: FluxPipeline, manifest: Manifest) -> None:
    sparing, events = frugal(pipe, manifest)
    options = {"negative_prompt": "a hen", "true_cfg_scale": 2.0}
    expected = picture(pipe, **options)
    np.testing.assert_array_equal(picture(sparing, **options), expected)
    assert events == [
        *("+clip", "+t5", "+conditioner", "-clip", "-t5", "-conditioner"),
        *("+transformer", "-transformer", "+vae_decoder", "-vae_decoder"),
    ]


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt(), NumericError("nan")])
def test_low_vram_leaves_no_engine_open_after_a_failure(
    pipe: FluxPipeline, manifest: Manifest, error: BaseException
) -> None:
    sparing, events = frugal(pipe, manifest)

    def fail(*_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        picture(sparing, callback_on_step_end=fail)
    opened = [event[1:] for event in events if event.startswith("+")]
    assert opened == [event[1:] for event in events if event.startswith("-")]
    assert opened[-1] == "transformer"
    np.testing.assert_array_equal(picture(sparing), picture(pipe))


def test_low_vram_refuses_sizes_before_it_opens_anything(
    pipe: FluxPipeline, manifest: Manifest
) -> None:
    sparing, events = frugal(pipe, manifest)
    with pytest.raises(UsageError, match=r"takes 1 to 64 text tokens"):
        picture(sparing, max_sequence_length=65)
    assert events == []
