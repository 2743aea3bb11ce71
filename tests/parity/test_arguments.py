"""What diffusers' pipelines take besides a prompt and a seed, pixel by pixel, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.host.pipeline import FluxPipeline
from tests.parity.bounds import PROMISE

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

FOX, ROBOT = "A red fox on a sandy beach at sunset", "A huge wooden robot inside a library"
USUAL = {
    "height": 48,
    "width": 64,
    "num_inference_steps": 3,
    "max_sequence_length": 24,
    "output_type": "np",
}


def generator(seed: int) -> Any:
    return torch.Generator("cpu").manual_seed(seed)


def worst(ours: Any, theirs: Any) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - np.asarray(theirs)).max())


@pytest.mark.parametrize(
    "text",
    [
        {"prompt": FOX, "prompt_2": ROBOT},
        {"prompt": FOX, "prompt_2": ""},
        {"prompt": [FOX, ROBOT, FOX], "prompt_2": [ROBOT, ROBOT, FOX]},
        {
            "prompt": FOX,
            "negative_prompt": "fog",
            "negative_prompt_2": ROBOT,
            "true_cfg_scale": 2.0,
        },
    ],
    ids=["another", "empty", "several", "negative"],
)
def test_what_t5_reads_instead(
    text: dict[str, Any],
    open_pipeline: Callable[..., FluxPipeline],
    open_reference: Callable[..., Any],
) -> None:
    expected = open_reference("dev")(**USUAL, **text, generator=generator(5)).images
    pictures = open_pipeline("dev")(**USUAL, **text, seed=5)
    assert worst(pictures.images, expected) < PROMISE


def test_embeddings_in_place_of_prompts(
    open_pipeline: Callable[..., FluxPipeline], open_reference: Callable[..., Any]
) -> None:
    pipe, reference = open_pipeline("dev"), open_reference("dev")
    with torch.no_grad():
        text, pooled, _ = reference.encode_prompt(FOX, ROBOT, max_sequence_length=40)
        away, away_pooled, _ = reference.encode_prompt("fog", max_sequence_length=40)
    given = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": away,
        "negative_pooled_prompt_embeds": away_pooled,
        "true_cfg_scale": 1.5,
    }
    usual = {name: value for name, value in USUAL.items() if name != "max_sequence_length"}
    expected = reference(**usual, **given, generator=generator(6)).images
    assert worst(pipe(**usual, **given, seed=6).images, expected) < PROMISE


@pytest.mark.parametrize("seeds", [[3, 4], [2**40 + 1, 0]])
@pytest.mark.parametrize("task", ["text", "image", "images", "mask"])
def test_a_seed_for_each_picture(
    task: str,
    seeds: list[int],
    open_pipeline: Callable[..., FluxPipeline],
    open_reference: Callable[..., Any],
) -> None:
    from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline

    pixels = np.random.default_rng(1).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    drawings = [Image.fromarray(each) for each in pixels]
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 0, 48, 48))
    extra, kind = {
        "text": ({}, None),
        "image": ({"image": drawings[0], "strength": 0.5}, FluxImg2ImgPipeline),
        "images": ({"image": drawings, "strength": 0.5}, FluxImg2ImgPipeline),
        "mask": (
            {"image": drawings[0], "mask_image": mask, "strength": 0.5},
            FluxInpaintPipeline,
        ),
    }[task]
    reference = open_reference("dev")
    if kind is not None:
        reference = kind.from_pipe(reference)
    call = {**USUAL, **extra, "prompt": FOX, "num_images_per_prompt": 2, "guidance_scale": 3.5}
    expected = reference(**call, generator=[generator(seed) for seed in seeds]).images
    made = open_pipeline("dev")(**call, seed=seeds)
    assert made.seed == tuple(seeds)
    assert worst(made.images, expected) < PROMISE


def test_latents_as_output(
    open_pipeline: Callable[..., FluxPipeline], open_reference: Callable[..., Any]
) -> None:
    call = {**USUAL, "prompt": FOX, "output_type": "latent"}
    expected = open_reference("dev")(**call, generator=generator(7), return_dict=False)
    made = open_pipeline("dev")(**call, seed=7, return_dict=False)
    assert isinstance(made, tuple)
    assert worst(made[0], expected[0]) < 1e-3


def test_an_interrupted_call_gives_what_is_there(
    open_pipeline: Callable[..., FluxPipeline], open_reference: Callable[..., Any]
) -> None:
    def stop(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return state

    call = {**USUAL, "prompt": FOX, "callback_on_step_end": stop}
    pipe = open_pipeline("dev")
    expected = open_reference("dev")(**call, generator=generator(8)).images
    assert worst(pipe(**call, seed=8).images, expected) < PROMISE
    assert pipe.interrupt
    whole = pipe(**USUAL, prompt=FOX, seed=8).images
    assert not pipe.interrupt
    assert np.abs(whole - expected).max() > PROMISE
