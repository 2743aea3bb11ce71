"""Inpainting on engines in memory: the kinds of masks, what is refused, and outpainting."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fluxdeploy.cli import main
from fluxdeploy.errors import UnusedArgumentWarning, UsageError
from fluxdeploy.host.input_images import open_mask, to_masks
from fluxdeploy.host.outpainting import outpaint_canvas
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.sampler import sampler_names
from tests.host.conftest import MemoryEngine
from tests.host.test_generate_command import opened
from tests.host.test_image_to_image import engines, image, manifest
from tests.host.test_input_images import png_of_size

__all__ = ["engines", "manifest", "opened"]

MARKED = np.zeros((32, 48), bool)
MARKED[:, 24:] = True
WHITE = Image.fromarray(np.where(MARKED, 255, 0).astype(np.uint8))


def picture(pipe: FluxPipeline, **options: Any) -> np.ndarray:
    call = {"prompt": "a fox", "seed": 3, "max_sequence_length": 16, "output_type": "np"}
    call |= {"image": image(), "mask_image": WHITE, "num_inference_steps": 5}
    return np.asarray(pipe(**{**call, **options}).images)


def transparent(mode: str = "RGBA") -> Image.Image:
    """A mask of OpenAI's kind: white all over, and transparent where it is to be redrawn."""
    rgba = np.full((32, 48, 4), 255, np.uint8)
    rgba[MARKED, 3] = 0
    return Image.fromarray(rgba).convert(mode)


def keyed(mode: str) -> Image.Image:
    """A mask where one colour counts as transparent."""
    mask = WHITE.point(lambda value: 10 if value else 20).convert(mode)
    mask.info["transparency"] = {"L": 10, "RGB": (10, 10, 10), "P": 10, "I;16": 10}[mode]
    return mask


KINDS: dict[str, Any] = {
    "white": WHITE,
    "white, RGB": WHITE.convert("RGB"),
    "one bit": WHITE.convert("1"),
    "palette": WHITE.convert("P"),
    "CMYK": WHITE.convert("RGB").convert("CMYK"),
    "16 bits": Image.fromarray(np.where(MARKED, 65535, 255).astype(np.uint16)),
    "opaque": WHITE.convert("RGBA"),
    "bool": MARKED,
    "bool with a batch and a channel": MARKED[None, ..., None],
    "bytes": np.asarray(WHITE),
    "bytes of 0 and 1": MARKED.astype(np.uint8),
    "bytes of colours": np.asarray(WHITE.convert("RGB")),
    "floats": MARKED.astype(np.float64),
    "half floats": MARKED.astype(np.float16)[None],
    "transparent": transparent(),
    "transparent, grey": transparent("LA"),
    "transparent bytes": np.asarray(transparent()),
    "transparent colour": keyed("RGB"),
    "transparent grey": keyed("L"),
    "transparent entry of a palette": keyed("P"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_says_the_same(kind: str) -> None:
    np.testing.assert_array_equal(to_masks(KINDS[kind], 32, 48), MARKED[None])


def test_a_transparent_16_bit_grey_is_told_from_its_neighbour(tmp_path: Path) -> None:
    # Both are the same in 8 bits.
    Image.fromarray(np.where(MARKED, 0x0A01, 0x0A02).astype(np.uint16)).save(
        tmp_path / "mask.png", transparency=0x0A01
    )
    mask, _ = open_mask(tmp_path / "mask.png")
    np.testing.assert_array_equal(to_masks(mask, 32, 48), MARKED[None])


def test_half_transparent_pixels_are_redrawn_from_the_middle_on() -> None:
    mask = Image.fromarray(np.dstack([np.zeros((16, 16, 3)), np.full((16, 16), 127)]).astype("u1"))
    assert to_masks(mask, 16, 16).all()
    mask.putalpha(128)
    assert not to_masks(mask, 16, 16).any()


def test_files_say_what_the_pictures_in_them_say(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    transparent().save(path)
    mask, digest = open_mask(path)
    np.testing.assert_array_equal(to_masks(mask, 32, 48), MARKED[None])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = WHITE.transpose(Image.Transpose.ROTATE_90)
    for name, options in (("mask.png", {"exif": exif}), ("mask.webp", {"exif": exif})):
        turned.save(tmp_path / name, **({"lossless": True} if name[-1] == "p" else {}), **options)
        mask, _ = open_mask(tmp_path / name)
        np.testing.assert_array_equal(to_masks(mask, 32, 48), MARKED[None])


def test_a_mask_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(png_of_size(60_000, 60_000))
    with pytest.raises(UsageError, match=r"mask\.png: The picture has more than 8192 x 8192"):
        open_mask(tmp_path / "mask.png")


@pytest.mark.filterwarnings("ignore:`mask_image` marks nothing")
def test_what_is_not_marked_is_held_to_the_image(pipe: FluxPipeline) -> None:
    first, other = picture(pipe), picture(pipe, prompt="a hen")
    kept = picture(pipe, mask_image=np.zeros((32, 48), bool))
    np.testing.assert_array_equal(first[:, :, :24], kept[:, :, :24])
    np.testing.assert_array_equal(first[:, :, :24], other[:, :, :24])
    assert np.abs(first - other)[:, :, 24:].max() > 1 / 255


@pytest.mark.parametrize("sampler", sampler_names())
@pytest.mark.filterwarnings("ignore:`mask_image` marks nothing")
def test_every_sampler_holds_what_is_not_marked(pipe: FluxPipeline, sampler: str) -> None:
    seen: list[int] = []
    first = picture(
        pipe,
        sampler=sampler,
        num_previews=1,
        callback_on_preview=lambda caller, steps, images: seen.append(steps),
    )
    kept = picture(pipe, mask_image=np.zeros((32, 48), bool))
    np.testing.assert_array_equal(first[:, :, :24], kept[:, :, :24])
    assert np.abs(first - kept)[:, :, 24:].max() > 1 / 255
    assert (sampler == "euler") == np.array_equal(first, picture(pipe))
    assert len(seen) == 1


def test_a_mask_of_all_is_image_to_image(pipe: FluxPipeline) -> None:
    whole = picture(pipe, mask_image=np.ones((32, 48), bool))
    np.testing.assert_array_equal(whole, picture(pipe, mask_image=None))


def test_masks_go_to_the_pictures_in_turn(pipe: FluxPipeline) -> None:
    masks = [WHITE, ~MARKED]
    call: dict[str, Any] = {"prompt": ["a fox"] * 2, "num_images_per_prompt": 2}
    both, first, second = (picture(pipe, mask_image=each, **call) for each in (masks, *masks))
    np.testing.assert_array_equal(both[::2], first[::2])
    np.testing.assert_array_equal(both[1::2], second[1::2])


def test_the_callback_sees_what_is_held(pipe: FluxPipeline) -> None:
    seen: list[np.ndarray] = []

    def on_step_end(pipe: Any, step: int, timestep: float, state: Any) -> None:
        seen.append(state["latents"].copy())

    for prompt in ("a fox", "a hen"):
        picture(pipe, prompt=prompt, callback_on_step_end=on_step_end)
    first, other = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    same = np.array([a == b for a, b in zip(first, other, strict=True)]).reshape(-1, 2, 3, 64)
    assert same[:, :, 0].all()
    assert not same[:, :, 2].any()


def test_a_crop_leaves_the_rest_of_the_image_as_it_was(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    original, mask = image(70, 100), np.zeros((70, 100), np.uint8)
    mask[30:40, 50:60] = 255
    call: dict[str, Any] = {
        "image": original,
        "mask_image": Image.fromarray(mask),
        "padding_mask_crop": 4,
    }
    (made,) = picture(pipe, **call)
    assert made.shape == (70, 100, 3)
    assert engines["vae_encoder"].runs == [{"images": (1, 3, 32, 48)}]
    difference = np.rint(made * 255) != np.asarray(original)
    assert not difference[mask == 0].any()
    assert difference[mask == 255].mean() > 0.5
    (pil,) = pipe("a fox", seed=3, max_sequence_length=16, num_inference_steps=5, **call).images
    np.testing.assert_array_equal(np.asarray(pil), np.rint(made * 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "`mask_image` has no place in text to image: inpainting takes `image`"),
        ({"mask_image": object()}, r"`mask_image` holds .*object.*Give a PIL image"),
        ({"mask_image": []}, "`mask_image` is an empty list"),
        ({"mask_image": "mask.png"}, "`mask_image` holds 'mask.png'"),
        ({"mask_image": np.zeros((2, 32, 48, 2))}, r"holds an array \[2, 32, 48, 2\]"),
        ({"mask_image": np.zeros(48, bool)}, r"holds an array \[48\]"),
        ({"mask_image": np.zeros((0, 48), bool)}, "without pixels"),
        ({"mask_image": np.zeros((32, 48), np.int64)}, "an array of int64"),
        ({"mask_image": np.full((32, 48), 2.0)}, "outside 0 to 1"),
        ({"mask_image": np.full((32, 48), np.nan)}, "outside 0 to 1"),
        ({"mask_image": Image.new("F", (32, 48))}, "mode 'F' has no known range"),
        ({"mask_image": Image.new("L", (0, 48))}, "without pixels"),
        ({"mask_image": Image.new("1", (8193, 8193))}, "more than 8192 x 8192 pixels"),
        ({"mask_image": np.broadcast_to(np.False_, (8193, 8193))}, "more than 8192 x 8192"),
        ({"mask_image": [WHITE, WHITE]}, "2 masks for 1 pictures"),
        ({"latents": np.zeros((1, 6, 64))}, "`latents` has no place in inpainting"),
        ({"strength": 0.0}, "At strength 0 none of 5 steps is left"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop` is -1; it must be at least 0"),
        ({"padding_mask_crop": 1.5}, "`padding_mask_crop` must be an integer"),
        ({"padding_mask_crop": True}, "`padding_mask_crop` must be an integer"),
        ({"padding_mask_crop": 1, "mask_image": MARKED}, "`mask_image` must be one PIL image"),
        ({"padding_mask_crop": 1, "image": [image()]}, "`image` must be one PIL image"),
        (
            {"padding_mask_crop": 1, "image": image(32, 49)},
            "`image` has 49x32 pixels and `mask_image` 48x32",
        ),
        ({"padding_mask_crop": 1, "mask_image": Image.new("L", (48, 32))}, "nothing to crop to"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        picture(pipe, **{"seed": None if "latents" in options else 3, **options})
    assert not any(engine.runs for engine in engines.values())


def test_a_mask_that_marks_no_latent_is_told(pipe: FluxPipeline) -> None:
    thin = np.zeros((32, 48), bool)
    thin[:, 1:8] = True
    with pytest.warns(UnusedArgumentWarning, match="`mask_image` marks nothing that can be redra"):
        picture(pipe, mask_image=thin)


def test_a_crop_without_a_mask_is_told(pipe: FluxPipeline) -> None:
    with pytest.warns(UnusedArgumentWarning, match="`padding_mask_crop` does nothing without `im"):
        picture(pipe, mask_image=None, padding_mask_crop=3)


def test_a_canvas_has_the_image_in_it_and_the_rest_is_marked() -> None:
    inside = image(50, 70)
    canvas, mask = outpaint_canvas(inside, 16, 5, 0, 3)
    assert (canvas.mode, mask.mode) == ("RGB", "L")
    assert canvas.size == mask.size == (96, 64)
    box = (16, 5, 16 + 70, 5 + 50)
    np.testing.assert_array_equal(np.asarray(canvas.crop(box)), np.asarray(inside))
    expected = np.full((64, 96), 255)
    expected[5:55, 16:86] = 0
    np.testing.assert_array_equal(np.asarray(mask), expected)
    # Until they are drawn, the margins repeat the edge.
    np.testing.assert_array_equal(np.asarray(canvas)[5:55, 3], np.asarray(inside)[:, 0])


@pytest.mark.parametrize(
    ("given", "sides", "message"),
    [
        (image(), (0, 0, 0, 0), "No pixels are to be added"),
        (image(), (-16, 0, 0, 0), "`left` is -16; it must be at least 0"),
        (image(), (0, 0, 1.5, 0), "`right` must be an integer"),
        (image(), (0, 10**9, 0, 0), "would have 48x1000000032 pixels; at most 8192 x 8192"),
        (np.zeros((32, 48, 3), np.uint8), (1, 0, 0, 0), "around a PIL image"),
        (Image.new("F", (32, 48)), (1, 0, 0, 0), "mode 'F' has no known range"),
    ],
)
def test_a_canvas_that_cannot_be_is_refused(given: Any, sides: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        outpaint_canvas(given, *sides)


def run(folder: Path, *options: object) -> Result:
    image(60, 50).save(folder / "start.png")
    arguments = ("generate", "a fox", "--image", folder / "start.png", "--seed", 2, *options)
    more = ("--out", folder / "image.png", "--max-sequence-length", 16)
    return CliRunner().invoke(main, [*map(str, (*arguments, *more))], prog_name="fluxdeploy")


def test_the_command_says_how_to_inpaint_it_again(opened: FluxPipeline, tmp_path: Path) -> None:
    mask = WHITE.resize((50, 60))
    mask.save(tmp_path / "mask.png")
    result = run(tmp_path, "--mask", tmp_path / "mask.png", "--mask-crop", 7)
    assert result.exit_code == 0, result.stderr
    made = read_metadata(tmp_path / "image.png")
    assert made.mask_sha256 == hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
    assert (made.padding_mask_crop, made.strength, made.outpaint) == (7, 0.6, None)
    again = picture(
        opened,
        image=image(60, 50),
        mask_image=mask,
        padding_mask_crop=made.padding_mask_crop,
        strength=made.strength,
        seed=made.seed,
        height=made.height,
        width=made.width,
        num_inference_steps=made.num_inference_steps,
    )
    with Image.open(tmp_path / "image.png") as drawn:
        assert drawn.size == (50, 60)
        np.testing.assert_array_equal(np.asarray(drawn), np.rint(again[0] * 255))


def test_the_command_draws_around_an_image(opened: FluxPipeline, tmp_path: Path) -> None:
    result = run(tmp_path, "--outpaint", "16,0, 30,4", "--strength", 1)
    assert result.exit_code == 0, result.stderr
    made = read_metadata(tmp_path / "image.png")
    assert (made.width, made.height, made.outpaint) == (96, 64, "16,0,30,4")
    assert (made.mask_sha256, made.padding_mask_crop) == (None, None)
    canvas, mask = outpaint_canvas(image(60, 50), 16, 0, 30, 4)
    again = picture(
        opened,
        image=canvas,
        mask_image=mask,
        strength=1,
        seed=2,
        height=64,
        width=96,
        num_inference_steps=3,
    )
    with Image.open(tmp_path / "image.png") as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.rint(again[0] * 255))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--outpaint", "16,0,16"), "is not LEFT,TOP,RIGHT,BOTTOM in pixels"),
        (("--outpaint", "-1,0,0,0"), "is not LEFT,TOP,RIGHT,BOTTOM in pixels"),
        (("--outpaint", "0,0,0,0"), "No pixels are to be added"),
        (
            ("--outpaint", "16,0,0,0", "--mask", "start.png"),
            "Outpainting needs one image, and makes",
        ),
        (("--mask", "mask.png"), "mask.png is not a picture that can be read"),
        (("--mask-crop", "-1"), "--mask-crop"),
    ],
)
def test_the_command_refuses_in_words(
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: dict[str, MemoryEngine],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.png").write_bytes(struct.pack(">Q", 0x89504E470D0A1A0A))
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not any(engine.runs for engine in engines.values())
