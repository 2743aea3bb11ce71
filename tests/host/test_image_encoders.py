"""Pixels for image encoders against the image processors of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.bundle.pixels import PixelSpec, check_pixels
from fluxdeploy.bundle.typed_json import FieldError
from fluxdeploy.errors import CheckpointError, UsageError
from fluxdeploy.host.image_encoders import to_pixel_values
from fluxdeploy.host.input_images import to_pictures

transformers = pytest.importorskip("transformers")

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Redux": (
        "SiglipImageProcessorPil",
        {"size": {"height": 31, "width": 31}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "odd": (
        "SiglipImageProcessorPil",
        {
            "size": {"height": 20, "width": 33},
            "resample": 2,
            "rescale_factor": 1 / 128,
            "image_mean": [0.1, 0.2, 0.3],
        },
    ),
    "IP-Adapter": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    ),
    "narrower crop": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 33}, "crop_size": {"height": 20, "width": 27}},
    ),
}


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 4))
    smooth = Image.fromarray(values.astype(np.uint8), "RGBA").resize((width, height))
    return smooth.convert(mode)


def saved_spec(name: str, tmp_path: Path) -> tuple[Any, PixelSpec]:
    from exporters.checkpoint.pixels import read_pixels

    kind, settings = PROCESSORS[name]
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    return processor, read_pixels(json.loads(file.read_text()), file)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    processor, spec = saved_spec(name, tmp_path)
    given = [picture(50, 70), picture(97, 33), picture(33, 33, "RGBA"), picture(40, 41, "L")]
    expected = processor.preprocess(images=given, do_convert_rgb=True, return_tensors="np")
    found = to_pixel_values(to_pictures(given), spec)
    # What is transparent may round another way.
    step = spec.scale / min(spec.std)
    assert np.abs(found - expected["pixel_values"]).max() < 1.01 * step
    for i in (0, 1, 3):
        assert np.abs(found[i] - expected["pixel_values"][i]).max() < 1e-5


def test_arrays_are_pictures_too() -> None:
    spec = PixelSpec((9, 9), None, "bicubic", 1 / 255, (0.0,) * 3, (1.0,) * 3)
    whole = picture(20, 30)
    exact = np.asarray(whole)
    for array in (exact, exact.astype(np.float32) / 255, exact[None]):
        np.testing.assert_array_equal(
            to_pixel_values(to_pictures(array), spec), to_pixel_values([whole], spec)
        )


def test_a_picture_that_is_too_narrow_is_refused() -> None:
    spec = PixelSpec((224,), (224, 224), "bicubic", 1 / 255, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UsageError, match="1x8000 pixels is too narrow"):
        to_pixel_values([Image.new("RGB", (1, 8000))], spec)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "one of a 'ViTImageProcessor'"),
        ({"do_resize": False}, "are resized, and not padded"),
        ({"size": {"longest_edge": 9}}, "height and width are needed"),
        ({"size": {"shortest_edge": 9}}, "crops nothing"),
        ({"size": {"height": 9, "width": 10**9}}, "a side of 1000000000"),
        ({"resample": 9}, "says resample 9"),
        ({"image_std": [1, 0, 1]}, "std is 0"),
        ({"image_mean": 0.5}, "has a number for each colour"),
        ({"rescale_factor": "1/255"}, "a number is needed"),
        ({"do_center_crop": True, "crop_size": 99}, "larger than what it is cut from"),
    ],
)
def test_a_preprocessor_that_is_not_computed_is_refused(changes: dict[str, Any], said: str) -> None:
    from exporters.checkpoint.pixels import read_pixels

    usual = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 9, "width": 9}}
    with pytest.raises(CheckpointError, match=said):
        read_pixels({**usual, **changes}, Path("preprocessor_config.json"))


def test_old_configs_are_read() -> None:
    from exporters.checkpoint.pixels import read_pixels

    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 200}
    spec = read_pixels(old, Path("preprocessor_config.json"))
    assert (spec.resize, spec.crop, spec.filter) == ((224,), (200, 200), "bicubic")
    check_pixels(spec, "pixels")
    with pytest.raises(FieldError, match=r"pixels\.filter"):
        check_pixels(PixelSpec((9, 9), None, "sharp", 1, (0,) * 3, (1,) * 3), "pixels")
