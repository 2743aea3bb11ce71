"""Pictures of the C++ library are those of the Python host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.bundle.manifest import Manifest, SkipRecord, TensorSpec
from fluxdeploy.errors import UnmeasuredSkipsWarning
from fluxdeploy.host.outpainting import outpaint_canvas
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.schedule import sigmas
from tests.conftest import BundleFactory
from tests.engines.cpp.conftest import picture
from tests.engines.cpp.graphs import changed_bundle
from tests.engines.cpp.library import Failure, Library, Pipeline, Step

Pair = tuple[FluxPipeline, Pipeline]

PROMPTS = ("a red circle above a blue square", "Ein Fuchs, gemalt – 狐狸 🦊 café", "")

LATENTS = np.random.RandomState(4).randn(1, 6, 64).astype(np.float32)

CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dev", {"prompt": PROMPTS[0], "seed": 1}),
    ("dev", {"prompt": PROMPTS[1], "seed": 2**40 + 3, "height": 48, "width": 80}),
    ("dev", {"prompt": list(PROMPTS), "seed": 3, "num_images_per_prompt": 2}),
    ("dev", {"prompt": PROMPTS[0], "negative_prompt": "blue", "true_cfg_scale": 2.5, "seed": 4}),
    ("dev", {"prompt": PROMPTS[0], "image": 1, "strength": 0.5, "num_inference_steps": 4}),
    ("dev", {"prompt": PROMPTS[2], "seed": 5, "guidance_scale": 0.0, "max_sequence_length": 9}),
    ("schnell", {"prompt": PROMPTS[0], "seed": 6, "num_inference_steps": 1}),
    ("schnell", {"prompt": PROMPTS[1], "seed": 7, "height": 96, "width": 32}),
    ("schnell", {"prompt": [PROMPTS[0]] * 2, "seed": 8, "num_images_per_prompt": 2}),
    ("schnell", {"prompt": PROMPTS[0], "image": 1, "num_inference_steps": 3, "seed": 9}),
    ("dev", {"prompt": PROMPTS[0], "image": 1, "mask_image": 1, "num_inference_steps": 3}),
    ("constant", {"prompt": PROMPTS[1], "seed": 10, "guidance_scale": 7.5}),
    (
        "constant",
        {
            "prompt": list(PROMPTS[:2]),
            "negative_prompt": ["", "x"],
            "true_cfg_scale": 4.0,
            "image": 2,
            "strength": 0.7,
            "seed": 11,
        },
    ),
    (
        "constant",
        {
            "prompt": list(PROMPTS[:2]),
            "num_images_per_prompt": 2,
            "negative_prompt": "x",
            "true_cfg_scale": 1.5,
            "image": 2,
            "mask_image": 4,
            "strength": 1.0,
        },
    ),
    ("constant", {"prompt": PROMPTS[0] * 40, "seed": 12, "max_sequence_length": 24}),
    ("dev", {"prompt": PROMPTS[:2], "prompt_2": ["a cat", PROMPTS[1]]}),
    (
        "dev",
        {
            "prompt": "",
            "prompt_2": PROMPTS[1],
            "negative_prompt": "red",
            "negative_prompt_2": "blue",
            "true_cfg_scale": 2.0,
            "seed": [7, 2**33],
            "num_images_per_prompt": 2,
            "sigmas": [1.0, 0.7, 0.2],
            "num_inference_steps": None,
        },
    ),
    ("dev", {"prompt": PROMPTS[0], "image": 1, "seed": [4, 5], "num_images_per_prompt": 2}),
    ("schnell", {"prompt": PROMPTS[0], "sigmas": [0.9, 0.3], "sampler": "ab2", "skip": [1]}),
    *(
        ("dev", {"prompt": PROMPTS[0], "num_inference_steps": 4, "sampler": sampler, **more})
        for sampler, more in (
            ("heun", {"negative_prompt": "x", "true_cfg_scale": 2.0}),
            ("midpoint", {"image": 1, "mask_image": 1, "strength": 0.8}),
            ("rk4", {}),
            ("ab2", {"skip": [2]}),
            ("dpmpp_2m", {"image": 1, "strength": 0.8, "skip": [1, 2]}),
            ("euler", {"negative_prompt": "x", "true_cfg_scale": 2.0, "skip": [2, 3]}),
        )
    ),
)


FAMILY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fill", {"image": 1, "mask_image": 1}),
    (
        "fill",
        {
            "prompt": list(PROMPTS[:2]),
            "num_images_per_prompt": 3,
            "image": 2,
            "mask_image": 3,
            "strength": 0.6,
            "num_inference_steps": 4,
        },
    ),
    ("fill", {"image": 1, "mask_image": 1, "padding_mask_crop": 3}),
    ("fill", {"image": 1, "mask_image": 1, "strength": 0.5, "latents": LATENTS}),
    ("control", {"control_image": 1}),
    (
        "control",
        {"prompt": list(PROMPTS[:2]), "num_images_per_prompt": 2, "control_image": 2},
    ),
    ("control", {"prompt": list(PROMPTS[:2]), "control_image": 2, "sampler": "heun"}),
    ("control", {"control_image": 1, "latents": LATENTS}),
    ("kontext", {}),
    ("kontext", {"image": 1, "auto_resize": False}),
    ("kontext", {"image": 1, "height": None, "width": None, "auto_resize": False}),
    ("kontext", {"image": 1, "max_area": 2000, "auto_resize": False}),
    (
        "kontext",
        {
            "prompt": list(PROMPTS[:2]),
            "negative_prompt": "x",
            "true_cfg_scale": 2.0,
            "image": 2,
            "auto_resize": False,
        },
    ),
    (
        "kontext",
        {"prompt": list(PROMPTS[:2]), "image": 4, "references": 2, "auto_resize": False},
    ),
)


@pytest.fixture(scope="module")
def pair(library: Library, bundle: BundleFactory) -> Iterator[Callable[[str], Pair]]:
    """`pair("dev")`: both hosts of a random checkpoint's bundle."""
    opened: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in opened:
            path = bundle(name)
            opened[name] = FluxPipeline.from_bundle(path, "onnxruntime"), library.pipeline(path)
        return opened[name]

    yield make
    for python, cpp in opened.values():
        python.close()
        cpp.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "call"), [*CALLS, *FAMILY], ids=[str(n) for n in range(len(CALLS) + len(FAMILY))]
)
def test_a_picture_is_pythons(pair: Callable[[str], Pair], name: str, call: dict[str, Any]) -> None:
    python, cpp = pair(name)
    usual = {"prompt": PROMPTS[0], "height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}
    call = {**usual, **call}
    images = [picture(seed, 50 + 20 * seed, 64) for seed in range(call.pop("image", 0))]
    masks = [picture(9 + seed, 40, 30 + 9 * seed) for seed in range(call.pop("mask_image", 0))]
    controls = [picture(20 + seed, 40, 60) for seed in range(call.pop("control_image", 0))]
    if "padding_mask_crop" in call:
        masks = [picture(9, *images[0].shape[:2])]
    pictures = {"image": images, "mask_image": masks, "control_image": controls}
    given: dict[str, Any] = {
        name: [Image.fromarray(each) for each in held] for name, held in pictures.items() if held
    }
    asked = dict(call)
    if (each := asked.pop("references", None)) is not None:
        given["image"] = [given["image"][at : at + each] for at in range(0, len(images), each)]
    if "padding_mask_crop" in call:
        given = {name: held[0] for name, held in given.items()}
    wanted = python(**asked, **given).images
    call = {name: value for name, value in call.items() if value is not None}
    found, _, seed = cpp(**call, **pictures)
    assert seed == (call["seed"] if isinstance(call["seed"], int) else None)
    difference = found.astype(int) - np.stack([np.asarray(each) for each in wanted])
    assert np.abs(difference).max() <= 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("marked", "padding", "size"),
    [
        ((slice(0, 45), slice(30, 33)), 0, (48, 32)),
        ((slice(7, 8), slice(63, 64)), 40, (32, 64)),
        ((slice(20, 30), slice(20, 40)), 2, (32, 48)),
        # Wider, and narrower, than a part can be: bars above and below, and at the sides.
        ((slice(10, 40), slice(0, 64)), 0, (64, 32)),
        ((slice(0, 50), slice(30, 34)), 0, (32, 96)),
    ],
)
def test_the_part_around_a_mask_is_drawn_and_laid_over_as_by_python(
    pair: Callable[[str], Pair],
    marked: tuple[slice, slice],
    padding: int,
    size: tuple[int, int],
) -> None:
    python, cpp = pair("dev")
    image, mask = picture(3, 50, 64), np.zeros((50, 64, 3), np.uint8)
    mask[marked] = picture(4, 50, 64)[marked] | 1
    call: dict[str, Any] = {
        "prompt": "a fox",
        "seed": 2,
        "num_inference_steps": 2,
        "strength": 0.9,
        "height": size[0],
        "width": size[1],
        "padding_mask_crop": padding,
    }
    wanted = python(image=Image.fromarray(image), mask_image=Image.fromarray(mask), **call).images
    found, _, _ = cpp(image=[image], mask_image=[mask], **call)
    assert found.shape == (1, 50, 64, 3)
    assert np.abs(found[0].astype(int) - np.asarray(wanted[0])).max() <= 1


def test_recorded_skips_and_spacings_are_pythons(
    library: Library, bundle: BundleFactory, tmp_path: Path
) -> None:
    def change(root: Path, manifest: Manifest) -> Manifest:
        record = SkipRecord("euler", 6, (3, 5), 2, 32, 48, 30.0, 31.0, 2)
        spaced = replace(manifest.schedule, spacing="beta")
        return replace(manifest, schedule=spaced, skips=(record,))

    changed_bundle(bundle("dev"), tmp_path / "x", change)
    call: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 6, "seed": 1, "skip": "auto"}
    call |= {"height": 48, "width": 32}
    cpp = library.pipeline(tmp_path / "x")
    with FluxPipeline.from_bundle(tmp_path / "x", "onnxruntime") as python:
        with pytest.warns(UnmeasuredSkipsWarning) as warned:
            wanted = python(**call).images[0]
        found, notices, _ = cpp(**call)
    assert notices == [str(each.message) for each in warned]
    assert np.abs(found[0].astype(int) - np.asarray(wanted)).max() <= 1
    whole, _, _ = cpp(**{**call, "skip": "none"})
    assert np.abs(whole[0].astype(int) - found[0]).max() > 0
    cpp.close()


@pytest.mark.parametrize("margins", [(3, 0, 5, 16), (0, 0, 0, 1), (16, 16, 16, 16)])
def test_a_canvas_for_outpainting_is_pythons(
    library: Library, margins: tuple[int, int, int, int]
) -> None:
    image = picture(5, 30, 41)
    wanted = outpaint_canvas(Image.fromarray(image), *margins)
    for own, other in zip(library.outpaint(image, margins), wanted, strict=True):
        np.testing.assert_array_equal(own, np.asarray(other.convert("RGB")))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompt_2": "word " * 50, "negative_prompt_2": "y"},
        {"negative_prompt": None, "negative_prompt_2": "y", "true_cfg_scale": 2.0},
    ],
)
def test_it_says_what_does_nothing_in_the_same_words(
    pair: Callable[[str], Pair], more: dict[str, Any]
) -> None:
    call: dict[str, Any] = {
        "prompt": "word " * 200,
        "negative_prompt": "x",
        "strength": 0.5,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_inference_steps": 1,
        "max_sequence_length": 16,
        **more,
    }
    python, cpp = pair("schnell")
    python._told.clear()
    with pytest.warns() as warned:
        python(**call)
    given = {name: value for name, value in call.items() if value is not None}
    assert cpp(**given)[1] == [str(each.message) for each in warned]


def test_token_ids_and_latents_stand_for_text_and_seed(pair: Callable[[str], Pair]) -> None:
    _, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 2}
    text, _, _ = cpp("a fox", seed=3, max_sequence_length=12, **size)
    both = (cpp.tokenize("clip", "a fox"), cpp.tokenize("t5", "a fox", 12))
    ids, _, _ = cpp(ids=[both], seed=3, **size)
    np.testing.assert_array_equal(ids, text)
    noise = cpp.library.noise(3, 16 * 4 * 6).reshape(1, 16, 2, 2, 3, 2)
    packed = noise.transpose(0, 2, 4, 1, 3, 5).reshape(1, 6, 64)
    latents, _, seed = cpp("a fox", latents=packed, max_sequence_length=12, **size)
    np.testing.assert_array_equal(latents, text)
    assert seed is None


@pytest.mark.parametrize("negative", [1, 2])
def test_embeddings_stand_for_prompts_as_in_python(
    pair: Callable[[str], Pair], negative: int
) -> None:
    python, cpp = pair("dev")
    (pooled,) = (spec.shape for spec in _conditioner(python) if spec.name == "pooled_embeddings")
    (text,) = (spec.shape for spec in _conditioner(python) if spec.name == "text_embeddings")
    random = np.random.RandomState(3)
    embeds = {
        f"{side}{name}": random.standard_normal(shape).astype(np.float32)
        for side, count in (("", 2), ("negative_", negative))
        for name, shape in (
            ("prompt_embeds", (count, 9, text[-1])),
            ("pooled_prompt_embeds", (count, pooled[-1])),
        )
    }
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    call |= {"true_cfg_scale": 2.0, "num_images_per_prompt": 2}
    wanted = python(**call, **embeds).images
    found, notices, _ = cpp(**call, embeds=embeds)
    assert notices == []
    difference = found.astype(int) - np.stack([np.asarray(each) for each in wanted])
    assert np.abs(difference).max() <= 1


def _conditioner(pipe: FluxPipeline) -> tuple[TensorSpec, ...]:
    return pipe.bundle.manifest.components["conditioner"].inputs


def test_a_callback_sees_every_step_and_may_change_it(pair: Callable[[str], Pair]) -> None:
    python, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 1}
    seen = []

    def look(step: Step) -> int:
        seen.append((step.step, step.total, step.timestep))
        step.view()[:] *= 0.5
        return 0

    found, _, _ = cpp("a fox", on_step=look, **size)
    levels = sigmas(python.bundle.manifest.schedule, 3, 4)
    timesteps = [float(level * np.float32(1000)) for level in levels[:-1]]
    assert seen == [(i + 1, 3, timestep) for i, timestep in enumerate(timesteps)]
    wanted = python(
        "a fox",
        callback_on_step_end=lambda pipe, i, t, state: {"latents": state["latents"] * 0.5},
        **size,
    ).images[0]
    assert np.abs(found[0].astype(int) - np.asarray(wanted)).max() <= 1


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_previews_are_pythons(pair: Callable[[str], Pair], sampler: str) -> None:
    python, cpp = pair("dev")
    call: dict[str, Any] = {"prompt": list(PROMPTS[:2]), "height": 32, "width": 48, "seed": 1}
    call |= {"num_inference_steps": 3, "sampler": sampler}
    wanted: list[np.ndarray] = []
    python(
        **call,
        preview_decoder="linear",
        callback_on_preview=lambda pipe, steps, pictures: wanted.append(
            np.stack([np.asarray(each) for each in pictures])
        ),
    )
    found = []

    def look(step: Step) -> int:
        found.append(step.previews())
        return 0

    shown, _, _ = cpp(**call, preview=1, on_step=look)
    assert np.stack(found).shape == (3, 2, 4, 6, 3)
    assert np.abs(np.stack(found).astype(int) - np.stack(wanted)).max() <= 1
    assert np.stack(found).std() > 10
    found.clear()
    np.testing.assert_array_equal(cpp(**call, on_step=look)[0], shown)
    assert found == [None] * 3


def test_previews_that_a_bundle_cannot_make_are_refused(
    library: Library, bundle: BundleFactory, tmp_path: Path
) -> None:
    def without_map(root: Path, manifest: Manifest) -> Manifest:
        return replace(manifest, preview=None)

    cpp = library.pipeline(changed_bundle(bundle("dev"), tmp_path / "x", without_map))
    with pytest.raises(Failure, match="has no map from latents to colours, which previews of each"):
        cpp("a fox", preview=1)
    cpp.close()


def test_a_callback_cancels_its_own_call_alone(pair: Callable[[str], Pair]) -> None:
    _, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
    token = cpp.library.c.fluxdeploy_cancel_new()
    with pytest.raises(Failure, match="after 2 of 3 steps; no picture was made") as failure:
        cpp("a fox", on_step=lambda step: step.step == 2, cancel=_pointer(token), **size)
    assert failure.value.code == "cancelled"
    cpp("a fox", cancel=_pointer(token), **size)
    cpp.library.c.fluxdeploy_cancel_now(_pointer(token))
    with pytest.raises(Failure, match="before it began"):
        cpp("a fox", cancel=_pointer(token), **size)
    cpp.library.c.fluxdeploy_cancel_free(_pointer(token))


def test_a_waiting_call_is_cancelled_and_its_turn_is_not(pair: Callable[[str], Pair]) -> None:
    _, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}
    token = _pointer(cpp.library.c.fluxdeploy_cancel_new())
    with ThreadPoolExecutor(1) as pool:
        waiting = []

        def start(step: Step) -> int:
            if not waiting:
                waiting.append(pool.submit(cpp, "a cat", cancel=token, **size))
                cpp.library.c.fluxdeploy_cancel_now(token)
                assert isinstance(waiting[0].exception(10), Failure)
            return 0

        cpp("a fox", on_step=start, **size)
    assert waiting[0].exception().code == "cancelled"


def test_clones_share_engines_and_run_side_by_side(pair: Callable[[str], Pair]) -> None:
    _, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4}
    alone = [cpp(prompt, seed=5, **size)[0] for prompt in PROMPTS]
    before = _memory()
    clones = [cpp.clone() for _ in range(100)]
    assert _memory() - before < 10 << 20
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(each, prompt, seed=5, **size)
            for each in (*clones[:3], cpp)
            for prompt in PROMPTS
        ]
        for index, call in enumerate(calls):
            np.testing.assert_array_equal(call.result()[0], alone[index % len(PROMPTS)])
    for clone in clones:
        clone.close()


def test_engines_may_be_open_only_while_they_are_needed(
    library: Library, pair: Callable[[str], Pair], bundle: BundleFactory
) -> None:
    _, cpp = pair("dev")
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 1}
    sparing = library.pipeline(bundle("dev"), low_vram=1)
    np.testing.assert_array_equal(sparing("a fox", **size)[0], cpp("a fox", **size)[0])
    sparing.close()


def test_each_component_passes_its_golden_gate(
    pair: Callable[[str], Pair],
) -> None:
    python, cpp = pair("schnell")
    found = cpp.check()
    assert set(found) == set(python.bundle.manifest.components)
    assert all(error < 1e-3 and cosine > 0.9999 for error, cosine in found.values())


def _pointer(address: int) -> Any:
    from ctypes import c_void_p

    return c_void_p(address)


def _memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
