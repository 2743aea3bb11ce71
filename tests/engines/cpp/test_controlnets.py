"""ControlNets in the C++ library: its pictures, its words and its options are Python's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from PIL import Image

from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    ControlNetRecord,
    Manifest,
    TensorSpec,
)
from fluxdeploy.cli.generate import command as generate
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.engines.cpp.conftest import picture
from tests.engines.cpp.graphs import changed_bundle, make_graph, weights, with_graph
from tests.engines.cpp.library import Failure, Library, Pipeline

Pair = tuple[FluxPipeline, Pipeline]

USUAL: dict[str, Any] = {
    "prompt": "a red circle above a blue square",
    "height": 48,
    "width": 32,
    "num_inference_steps": 4,
    "max_sequence_length": 16,
    "seed": 5,
}


@pytest.fixture(scope="module")
def mixed(union: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a Union, and a second ControlNet that knows one kind and takes pixels.

    It is the Union's network with the kind in its conditioner's graph, and tokens by a product.
    """

    def change(root: Path, manifest: Manifest) -> Manifest:
        own = manifest.components
        second = {
            "controlnet_2": own["controlnet"],
            "controlnet_2_conditioner": _with_one_kind(root, own["controlnet_conditioner"]),
            "controlnet_2_encoder": _encoder(root, manifest),
        }
        records = (*manifest.controlnets, ControlNetRecord("controlnet_2", 0))
        return replace(manifest, components={**own, **second}, controlnets=records)

    return changed_bundle(union, tmp_path_factory.mktemp("mixed") / "bundle", change)


def _with_one_kind(root: Path, record: ComponentRecord) -> ComponentRecord:
    """A conditioner whose graph has the number of the kind in place of an input."""
    model = onnx.load(root / record.engines[0].path, load_external_data=False)
    (kind,) = (each for each in model.graph.input if each.name == "control_mode")
    model.graph.input.remove(kind)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    value = helper.make_tensor("value", onnx.TensorProto.INT32, [1], [2])
    nodes = [
        helper.make_node("Shape", ["pooled_embeddings"], ["prompts"], start=0, end=1),
        helper.make_node("Concat", ["prompts", "one"], ["sizes"], axis=0),
        helper.make_node("ConstantOfShape", ["sizes"], ["control_mode"], value=value),
    ]
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    inputs = tuple(spec for spec in record.inputs if spec.name != "control_mode")
    return with_graph(root, replace(record, inputs=inputs), "one_kind", model)


def _encoder(root: Path, manifest: Manifest) -> ComponentRecord:
    """What makes tokens of pixels: each a product of its own."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "images": ("B", 3, "H", "W"),
        "control_latents": ("B", "L", 64),
    }
    pixels = 3 * 16 * 16
    model = make_graph(
        [
            helper.make_node("SpaceToDepth", ["images"], ["blocks"], blocksize=16),
            helper.make_node("Transpose", ["blocks"], ["rows"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", ["rows", "sizes"], ["tokens"]),
            helper.make_node("MatMul", ["tokens", "weights"], ["control_latents"]),
        ],
        {"images": shapes["images"]},
        {"control_latents": shapes["control_latents"]},
        {"sizes": np.array([0, -1, pixels]), "weights": weights(4, 64, pixels).T.copy()},
    )
    like = manifest.components["vae_encoder"]
    taken = like.engines[0].dimensions
    tokens = manifest.components["transformer"].engines[0].dimensions["L"]
    dimensions = {"B": taken["B"], "H": taken["H"], "W": taken["W"], "L": tokens}
    record = replace(
        like,
        inputs=(TensorSpec("images", "float32", shapes["images"]),),
        outputs=(TensorSpec("control_latents", "float32", shapes["control_latents"]),),
        files=(),
        engines=(replace(like.engines[0], dimensions=dimensions),),
    )
    return with_graph(root, record, "encoder", model)


@pytest.fixture(scope="module")
def one(library: Library, union: Path) -> Iterator[Pair]:
    """Both hosts of a bundle with a Union."""
    cpp = library.pipeline(union)
    with FluxPipeline.from_bundle(union, "onnxruntime") as python:
        yield python, cpp
    cpp.close()


@pytest.fixture(scope="module")
def two(library: Library, mixed: Path) -> Iterator[Pair]:
    """Both hosts of a bundle with two ControlNets."""
    cpp = library.pipeline(mixed)
    with FluxPipeline.from_bundle(mixed, "onnxruntime") as python:
        yield python, cpp
    cpp.close()


def python_call(call: dict[str, Any], several: bool) -> dict[str, Any]:
    """A call of the library as one of the pipeline: its pictures, and None where nothing is."""
    given = {**USUAL, **call}
    sets = given.pop("control_image", [])
    images = [[Image.fromarray(each) for each in pictures] for pictures in sets]
    if sets:
        given["control_image"] = images if several else images[0]
    for name in ("image", "mask_image"):
        if name in given:
            given[name] = [Image.fromarray(each) for each in given[name]]
    if isinstance(given.get("control_mode"), list):
        given["control_mode"] = [None if mode == -1 else mode for mode in given["control_mode"]]
    return given


FIRST, SECOND, THIRD = picture(1, 40, 50), picture(2, 48, 32), picture(3, 70, 33)
LATENTS = np.random.RandomState(4).randn(1, 6, 64).astype(np.float32)
MASK = np.kron(np.eye(2)[..., None], np.full((24, 16, 3), 255)).astype(np.uint8)

UNIONS: dict[str, dict[str, Any]] = {
    "no control": {},
    "one": {"control_image": [[FIRST]], "control_mode": 3},
    "one a prompt, negative prompts": {
        "prompt": ["a fox", "a robot"],
        "negative_prompt": ["x", ""],
        "true_cfg_scale": 2.0,
        "num_images_per_prompt": 2,
        "control_image": [[FIRST, SECOND]],
        "control_mode": 0,
        "controlnet_conditioning_scale": 0.7,
    },
    "one a picture, a seed each, parts of the steps, levels between": {
        "prompt": ["a fox", "a robot"],
        "seed": [1, 2],
        "control_image": [[THIRD, SECOND]],
        "control_mode": 4,
        "control_guidance_start": 0.25,
        "control_guidance_end": 0.75,
        "sampler": "heun",
    },
    "skipped steps": {
        "control_image": [[SECOND]],
        "control_mode": 1,
        "controlnet_conditioning_scale": -1.3,
        "skip": [2],
    },
    "latents": {"control_image": [[FIRST]], "control_mode": [3], "latents": LATENTS},
    "images, a part of the steps": {
        "prompt": ["a fox", "a robot"],
        "image": [THIRD, SECOND],
        "strength": 0.6,
        "control_image": [[FIRST]],
        "control_mode": 3,
        "control_guidance_start": 0.3,
        "num_inference_steps": 5,
    },
    "an image and a mask, skipped steps": {
        "image": [SECOND],
        "mask_image": [MASK],
        "strength": 0.8,
        "control_image": [[FIRST]],
        "control_mode": 3,
        "skip": [2],
    },
}

TWOS: dict[str, dict[str, Any]] = {
    "a mode for all": {"control_image": [[FIRST], [SECOND]], "control_mode": 3},
    "numbers for each": {
        "prompt": ["a fox", "a robot"],
        "control_image": [[FIRST, SECOND], [THIRD]],
        "control_mode": [2, -1],
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.8, 1.0],
        "negative_prompt": "blurred",
        "true_cfg_scale": 1.5,
    },
    "the second alone": {
        "control_image": [[FIRST], [SECOND]],
        "control_mode": 0,
        "controlnet_conditioning_scale": [0.0, 1.0],
    },
    "an image": {
        "image": [THIRD],
        "strength": 0.5,
        "control_image": [[FIRST], [SECOND]],
        "control_mode": [4, -1],
        "controlnet_conditioning_scale": [0.7, 1.2],
    },
    "images, masks and a seed for each": {
        "prompt": ["a fox", "a robot"],
        "seed": [1, 2],
        "image": [FIRST, SECOND],
        "mask_image": [MASK, 255 - MASK],
        "strength": 1.0,
        "control_image": [[FIRST], [SECOND, THIRD]],
        "control_mode": 1,
        "negative_prompt": "blurred",
        "true_cfg_scale": 1.5,
    },
}


def assert_equal(pair: Pair, call: dict[str, Any], several: bool) -> np.ndarray:
    python, cpp = pair
    wanted = python(**python_call(call, several)).images
    found, notices, _ = cpp(**{**USUAL, **call})
    assert notices == []
    difference = found.astype(int) - np.stack([np.asarray(each) for each in wanted])
    assert np.abs(difference).max() <= 1
    return found


@pytest.mark.parametrize("call", UNIONS.values(), ids=UNIONS.keys())
def test_a_picture_with_one_is_pythons(one: Pair, call: dict[str, Any]) -> None:
    assert_equal(one, call, several=False)


@pytest.mark.parametrize("call", TWOS.values(), ids=TWOS.keys())
def test_a_picture_with_several_is_pythons(two: Pair, call: dict[str, Any]) -> None:
    found = assert_equal(two, call, several=True)
    kept = ("prompt", "seed", "image", "mask_image", "strength")
    plain, _, _ = two[1](**{**USUAL, **{name: call[name] for name in kept if name in call}})
    assert np.abs(found.astype(int) - plain).max() > 8


def test_an_engine_is_open_only_while_it_is_needed(
    library: Library, two: Pair, mixed: Path
) -> None:
    sparing = library.pipeline(mixed, low_vram=1)
    call = {**USUAL, **TWOS["numbers for each"]}
    np.testing.assert_array_equal(sparing(**call)[0], two[1](**call)[0])
    sparing.close()


def test_the_callback_s_step_does_not_move_the_part_that_counts(one: Pair) -> None:
    """What counts in the first half of the steps does so whoever looks on."""
    call = {**USUAL, "control_image": [[FIRST]], "control_mode": 3, "control_guidance_end": 0.5}
    seen: list[int] = []
    looked, _, _ = one[1](**call, on_step=lambda step: seen.append(step.step) or 0)
    np.testing.assert_array_equal(looked, one[1](**call)[0])
    assert seen == [1, 2, 3, 4]


def test_it_says_where_no_controlnet_counts(one: Pair) -> None:
    call = {"control_image": [[FIRST]], "control_mode": 3, "control_guidance_end": 0.1}
    python, cpp = one
    with pytest.warns(UserWarning, match="`control_image` does nothing: in none of 4") as warned:
        python(**python_call(call, several=False))
    assert cpp(**{**USUAL, **call})[1] == [str(each.message) for each in warned]
    call |= {"image": [SECOND], "strength": 1.0}
    with pytest.warns(UserWarning, match="`image` does nothing: at strength 1") as warned:
        python(**python_call(call, several=False))
    assert cpp(**{**USUAL, **call})[1] == [
        *(str(each.message) for each in warned),
        "`control_image` does nothing: in none of 4 steps a ControlNet counts. Raise "
        "`controlnet_conditioning_scale` or `control_guidance_end`, or lower "
        "`control_guidance_start`.",
    ]
    words = {"control_guidance_start": 0.5, "controlnet_conditioning_scale": 2.0}
    with pytest.warns(UserWarning, match="does nothing without `control_image`") as warned:
        python(**USUAL, **words)
    assert cpp(**USUAL, **words)[1] == [str(each.message) for each in warned]


def test_a_seed_draws_for_the_control_picture_beside_latents(one: Pair) -> None:
    """Where none is given the system's is told, with which the same picture is made again."""
    call = {"control_image": [[FIRST]], "control_mode": 3, "latents": LATENTS, "seed": ()}
    found, notices, seed = one[1](**{**USUAL, **call})
    assert notices == []
    assert seed is not None
    again = one[0](**python_call({**call, "seed": seed}, several=False))
    assert again.seed == seed
    assert np.abs(found[0].astype(int) - np.asarray(again.images[0])).max() <= 1


BAD_ONE: dict[str, dict[str, Any]] = {
    "no mode": {"control_image": [[FIRST]]},
    "a mode that is not there": {"control_image": [[FIRST]], "control_mode": 5},
    "modes": {"control_image": [[FIRST]], "control_mode": [1, 2]},
    "a scale": {"control_image": [[FIRST]], "controlnet_conditioning_scale": 1001.0},
    "no number": {"control_image": [[FIRST]], "controlnet_conditioning_scale": float("nan")},
    "a start": {"control_image": [[FIRST]], "control_guidance_start": -0.1},
    "an end": {"control_image": [[FIRST]], "control_guidance_end": 1.5},
    "pictures": {"control_image": [[FIRST] * 3], "prompt": ["a", "b"]},
    "an image, no mode": {"control_image": [[FIRST]], "image": [FIRST]},
    "no steps": {"control_image": [[FIRST]], "image": [FIRST], "strength": 0.0},
    "images": {"control_image": [[FIRST]], "image": [FIRST, SECOND]},
    "a mask alone": {"control_image": [[FIRST]], "mask_image": [MASK]},
    "latents beside a mask": {
        "control_image": [[FIRST]],
        "image": [SECOND],
        "mask_image": [MASK],
        "latents": LATENTS,
    },
    "a part of the picture": {
        "control_image": [[FIRST]],
        "image": [SECOND],
        "mask_image": [MASK],
        "padding_mask_crop": 8,
    },
    "a reference's option": {"control_image": [[FIRST]], "image": [FIRST], "max_area": 2000},
}
for each in ("a scale", "no number", "a start", "an end"):
    BAD_ONE[each]["control_mode"] = 0
BAD_ONE["pictures"]["control_mode"] = 0

BAD_TWO: dict[str, dict[str, Any]] = {
    "one set": {"control_image": [[FIRST]], "control_mode": 0},
    "modes for all kinds": {"control_image": [[FIRST], [SECOND]], "control_mode": [0, 1]},
    "scales": {
        "control_image": [[FIRST], [SECOND]],
        "control_mode": 0,
        "controlnet_conditioning_scale": [1.0, 1.0, 1.0],
    },
    "ends": {
        "control_image": [[FIRST], [SECOND]],
        "control_mode": 0,
        "control_guidance_end": [0.5, 2.0],
    },
    "the second's pictures": {
        "control_image": [[FIRST], [SECOND, SECOND, THIRD]],
        "control_mode": 0,
    },
}


def assert_refused_alike(pair: Pair, call: dict[str, Any], several: bool) -> None:
    python, cpp = pair
    given = python_call(call, several)
    with pytest.raises(UsageError) as wanted:
        python(**given)
    with pytest.raises(Failure) as found:
        cpp(**{**USUAL, **call})
    assert (found.value.code, str(found.value)) == ("usage", str(wanted.value))


@pytest.mark.parametrize("call", BAD_ONE.values(), ids=BAD_ONE.keys())
def test_what_one_does_not_take_is_refused_in_the_same_words(
    one: Pair, call: dict[str, Any]
) -> None:
    assert_refused_alike(one, call, several=False)


@pytest.mark.parametrize("call", BAD_TWO.values(), ids=BAD_TWO.keys())
def test_what_several_do_not_take_is_refused_in_the_same_words(
    two: Pair, call: dict[str, Any]
) -> None:
    assert_refused_alike(two, call, several=True)


def test_pictures_of_more_controlnets_than_there_are_are_refused(one: Pair) -> None:
    with pytest.raises(Failure, match="of 2 ControlNets, and this bundle has 1"):
        one[1](**USUAL, control_image=[[FIRST], [SECOND]], control_mode=0)
    with pytest.raises(AssertionError):
        one[1](**USUAL, control_image=[[] for _ in range(100)] + [[FIRST]], control_mode=0)


def test_the_commands_options_are_generates(built: Path, mixed: Path, tmp_path: Path) -> None:
    for name, pixels in (("a", FIRST), ("b", SECOND)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    options = (
        f"--control-image {tmp_path}/a.png --control-image {tmp_path}/b.png --control-mode 2 "
        "--controlnet-scale 0.7 --controlnet-scale 1 --control-start 0.25 --control-end 1 "
        f"--image {tmp_path}/b.png --mask {tmp_path}/a.png --strength 0.8 "
        "--width 32 --height 48 --steps 4 --seed 3"
    ).split()
    wanted, found = tmp_path / "python.png", tmp_path / "cpp.png"
    python = ["a fox", *options, "--bundle", str(mixed), "--out", str(wanted)]
    CliRunner().invoke(generate, python, catch_exceptions=False)
    words = [built / "fluxdeploy-cpp", mixed, "a fox", *options, "-o", found]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_metadata(found) == read_metadata(wanted)
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (found, wanted)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
