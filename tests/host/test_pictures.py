from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.host.pictures import (
    PictureMetadata,
    picture_paths,
    read_metadata,
    save_picture,
    to_pil,
)

METADATA = PictureMetadata(
    prompt="a red circle",
    prompt_2=None,
    negative_prompt=None,
    negative_prompt_2=None,
    true_cfg_scale=1.0,
    seed=2**64 - 1,
    index=0,
    num_inference_steps=28,
    guidance_scale=3.5,
    max_sequence_length=512,
    height=16,
    width=32,
    strength=None,
    image_sha256=None,
    mask_sha256=None,
    padding_mask_crop=None,
    outpaint=None,
    bundle_hash="ab" * 32,
    fluxdeploy_version="0.1.0",
)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "prompt",
    ["", "a red circle", "café, naïve", "一只猫 🐈‍⬛", 'two\nlines\tand \\ "quotes"', "x" * 5000],
)
@pytest.mark.parametrize("negative_prompt", [None, "", "размыто"])
def test_metadata_and_pixels_survive_the_file(
    tmp_path: Path, picture: Image.Image, prompt: str, negative_prompt: str | None
) -> None:
    metadata = dataclasses.replace(METADATA, prompt=prompt, negative_prompt=negative_prompt)
    path = tmp_path / "image.png"
    save_picture(picture, path, metadata)
    assert read_metadata(path) == metadata
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(picture))
    assert os.listdir(tmp_path) == ["image.png"]


def test_a_prompt_without_utf8_form_is_still_saved(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "image.png"
    save_picture(picture, path, dataclasses.replace(METADATA, prompt="a\udce9b"))
    assert read_metadata(path).prompt == "a?b"


def test_a_picture_of_own_latents_has_no_seed(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "image.png"
    save_picture(picture, path, dataclasses.replace(METADATA, seed=None))
    assert read_metadata(path).seed is None


def test_each_picture_of_a_call_keeps_its_own_index(tmp_path: Path, picture: Image.Image) -> None:
    paths = picture_paths(tmp_path / "image.png", 3)
    for index, path in enumerate(paths):
        save_picture(picture, path, dataclasses.replace(METADATA, index=index))
    assert [read_metadata(path).index for path in paths] == [0, 1, 2]


def test_image_to_image_tells_its_strength_and_image(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "image.png"
    metadata = dataclasses.replace(METADATA, strength=0.35, image_sha256="0f" * 32)
    save_picture(picture, path, metadata)
    assert read_metadata(path) == metadata


def test_a_failed_write_keeps_the_old_picture(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.png"
    save_picture(picture, path, METADATA)
    before = path.read_bytes()

    def fail(self: Image.Image, file: object, **options: object) -> None:
        file.write(b"half a picture")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(FluxDeployError, match=r"Cannot write .*No space left on device\. Choose"):
        save_picture(picture, path, dataclasses.replace(METADATA, seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["image.png"]


def test_a_missing_folder_is_told(tmp_path: Path, picture: Image.Image) -> None:
    with pytest.raises(FluxDeployError, match="Cannot write"):
        save_picture(picture, tmp_path / "none" / "image.png", METADATA)


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_a_picture_has_the_permissions_of_any_new_file(
    tmp_path: Path, picture: Image.Image
) -> None:
    other = tmp_path / "other"
    other.touch()
    save_picture(picture, tmp_path / "image.png", METADATA)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (other, tmp_path / "image.png")}
    assert len(modes) == 1


def test_several_pictures_are_numbered() -> None:
    path = Path("out/my.image.PNG")
    assert picture_paths(path, 1) == [path]
    assert picture_paths(path, 2) == [Path("out/my.image-0.PNG"), Path("out/my.image-1.PNG")]


@pytest.mark.parametrize("name", ["image.jpg", "image", "image.webp", ".png"])
def test_other_formats_are_refused(tmp_path: Path, picture: Image.Image, name: str) -> None:
    with pytest.raises(UsageError, match=r"End the name in \.png"):
        picture_paths(tmp_path / name, 1)
    with pytest.raises(UsageError, match=r"End the name in \.png"):
        save_picture(picture, tmp_path / name, METADATA)


def test_pictures_of_other_programs_have_no_metadata(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "image.png"
    picture.save(path)
    with pytest.raises(FluxDeployError, match="does not say how it was made"):
        read_metadata(path)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"text"])
def test_broken_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FluxDeployError, match="cannot be read as a PNG"):
        read_metadata(path)


def test_eight_bits_are_rounded_half_to_even_as_in_diffusers() -> None:
    halves = (np.arange(256, dtype=np.float32) - np.float32(0.5)).clip(0) / np.float32(255)
    values = np.concatenate([halves, np.linspace(0, 1, 512, dtype=np.float32)])
    pictures = np.broadcast_to(values[None, None, :, None], (2, 4, len(values), 3))
    made = [np.asarray(picture) for picture in to_pil(pictures)]
    assert made[0].shape == (4, len(values), 3)
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.image_processor.VaeImageProcessor.numpy_to_pil(pictures)
    for ours, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs))
