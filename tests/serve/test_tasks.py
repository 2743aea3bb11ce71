"""What a request's files become, for bundles that were not made for text to image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.serve.images_api.bodies import EditBody, read_fields
from fluxdeploy.serve.images_api.drawing import limits_of, read_drawing
from fluxdeploy.serve.images_api.errors import ApiError
from fluxdeploy.serve.images_api.settings import Settings
from fluxdeploy.serve.images_api.uploads import Pictures

BODY = EditBody(prompt="make it blue")
WIDE, TALL = Image.new("RGB", (60, 30)), Image.new("RGB", (30, 60))


def manifest(bundle: Path, *tasks: str) -> Manifest:
    return dataclasses.replace(open_bundle(bundle).manifest, tasks=tasks)


def test_a_kontext_bundle_takes_several_images_of_their_own_sizes(demo_bundle: Path) -> None:
    kontext = manifest(demo_bundle, "text to image", "kontext")
    drawing = read_drawing(BODY, kontext, Settings(), Pictures((WIDE, TALL)))
    assert drawing.arguments["image"] == [[WIDE, TALL]]
    assert drawing.width > 1.5 * drawing.height
    limits = limits_of(kontext, Settings())
    assert (limits["tasks"], limits["strength"]) == (["generations", "edits"], None)
    assert (limits["image"], limits["mask"]) == ("image", False)


def test_another_bundle_draws_from_one_image(demo_bundle: Path) -> None:
    fill = manifest(demo_bundle, "fill")
    with pytest.raises(ApiError, match="There are 2 images"):
        read_drawing(BODY, fill, Settings(), Pictures((WIDE, TALL), TALL))
    drawing = read_drawing(BODY, fill, Settings(), Pictures((WIDE,), TALL))
    size = (drawing.width, drawing.height)
    assert drawing.arguments["image"].size == drawing.arguments["mask_image"].size == size
    limits = limits_of(fill, Settings())
    assert (limits["tasks"], limits["strength"]) == (["edits"], fill.defaults.strength)
    assert (limits["image"], limits["mask"]) == ("image", True)


def test_a_control_image_stands_in_place_of_an_image(demo_bundle: Path) -> None:
    control = manifest(demo_bundle, "control")
    drawing = read_drawing(BODY, control, Settings(), Pictures(controls=(WIDE,)))
    assert "image" not in drawing.arguments
    assert drawing.arguments["control_image"].size == (drawing.width, drawing.height)
    assert drawing.width > drawing.height


def test_controlnets_are_told_apart_with_commas_and_go_with_an_image(demo_bundle: Path) -> None:
    controlled = manifest(demo_bundle, "text to image", "image to image", "controlnet")
    fields = {
        "prompt": "a house",
        "control_mode": "2, 0",
        "controlnet_conditioning_scale": "0.7",
        "control_guidance_start": "0, 0.5",
        "control_guidance_end": "1",
    }
    body = read_fields(EditBody, fields)
    drawing = read_drawing(body, controlled, Settings(), Pictures((TALL,), None, (WIDE, TALL)))
    size = (drawing.width, drawing.height)
    assert drawing.height > drawing.width, "the image decides"
    assert [picture.size for picture in drawing.arguments["control_image"]] == [size, size]
    assert drawing.arguments["image"].size == size
    assert drawing.arguments["control_mode"] == [2, 0]
    assert drawing.arguments["controlnet_conditioning_scale"] == 0.7
    assert drawing.arguments["control_guidance_start"] == [0, 0.5]
    assert drawing.arguments["control_guidance_end"] == 1
    for name, value in (("control_mode", "2,a"), ("control_guidance_end", "nan")):
        with pytest.raises(ApiError, match=name):
            read_fields(EditBody, {"prompt": "a house", name: value})


def test_what_is_varied_keeps_its_size_and_needs_no_image(redux_bundle: Path) -> None:
    manifest = open_bundle(redux_bundle).manifest
    body = EditBody(prompt="in winter", prompt_embeds_scale=0.7)
    drawing = read_drawing(body, manifest, Settings(), Pictures(redux_images=(WIDE, TALL)))
    assert drawing.arguments["redux_image"] == [WIDE, TALL]
    assert drawing.arguments["prompt_embeds_scale"] == 0.7
    assert "image" not in drawing.arguments
    alone = dataclasses.replace(manifest, tasks=("text to image",))
    assert limits_of(alone, Settings())["tasks"] == ["generations", "edits"]


def test_what_is_seen_keeps_its_size_and_needs_no_image(ip_adapter_bundle: Path) -> None:
    manifest = open_bundle(ip_adapter_bundle).manifest
    body = EditBody(prompt="in winter", ip_adapter_scale=0.7)
    seen = {"ip_adapter_image": WIDE, "negative_ip_adapter_image": TALL}
    drawing = read_drawing(body, manifest, Settings(), Pictures(seen=seen))
    assert {name: drawing.arguments[name] for name in seen} == seen
    assert drawing.arguments["ip_adapter_scale"] == 0.7
    assert "image" not in drawing.arguments
    alone = dataclasses.replace(manifest, tasks=("text to image",))
    assert limits_of(alone, Settings())["tasks"] == ["generations", "edits"]
