"""Inpainting against diffusers' FluxInpaintPipeline, float32, pixel by pixel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fluxdeploy.host.input_images import open_mask, to_masks
from fluxdeploy.host.mask_crop import crop_region, crop_to_mask
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.noise import Generators
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, floats, photograph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


def marks(height: int, width: int, mode: str = "L", seed: int = 0) -> Image.Image:
    """A mask with a soft ellipse and a bar, and some greys near the middle."""
    random = np.random.default_rng(seed)
    image = Image.new("L", (width, height))
    painter = ImageDraw.Draw(image)
    left, top = (int(random.integers(0, size // 3)) for size in (width, height))
    painter.ellipse((left, top, left + width // 2, top + height // 2), fill=255)
    painter.rectangle((width // 2, height // 2, width * 3 // 4, height * 7 // 8), fill=140)
    painter.rectangle((0, height * 7 // 8, width // 4, height), fill=127)
    return image.convert(mode)


def binary(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(marks(height, width, seed=seed)) >= 128


@dataclass(frozen=True)
class Case:
    """A call of both pipelines."""

    name: str
    height: int
    width: int
    num_inference_steps: int
    strength: float
    image: Callable[[], Any]
    mask_image: Callable[[], Any]
    prompt: str | list[str] = FOX
    num_images_per_prompt: int = 1
    max_sequence_length: int = 16
    guidance_scale: float = 3.5
    true_cfg_scale: float = 1.0
    negative_prompt: str | list[str] | None = None
    padding_mask_crop: int | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments that both pipelines take under one name."""
        own = {k: v for k, v in vars(self).items() if k not in ("name", "seed")}
        return own | {"image": self.image(), "mask_image": self.mask_image()}


def some(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return functools.partial(function, *arguments)


CASES = (
    Case("same size", 64, 48, 4, 0.6, some(photograph, 64, 48), some(marks, 64, 48)),
    Case("all noise", 48, 80, 3, 1.0, some(photograph, 48, 80), some(marks, 48, 80), seed=1),
    Case("one step", 32, 64, 3, 0.2, some(photograph, 32, 64), some(marks, 32, 64), seed=2),
    Case("colours, resized", 64, 80, 4, 0.5, some(photograph, 99, 70), some(marks, 61, 200, "RGB")),
    Case("one bit, resized", 48, 48, 4, 0.5, some(photograph, 48, 48), some(marks, 99, 71, "1")),
    Case("palette", 48, 64, 4, 0.7, some(photograph, 48, 64), some(marks, 90, 64, "P"), seed=3),
    Case(
        "floats", 64, 64, 4, 0.7, some(floats, 40, 80), lambda: np.float32(binary(51, 90)), seed=4
    ),
    Case(
        "bytes of 0 and 255",
        48,
        64,
        4,
        0.7,
        some(photograph, 48, 64),
        lambda: np.uint8(binary(70, 50)) * np.uint8(255),
    ),
    Case(
        "bytes of 0 and 1",
        48,
        64,
        4,
        0.7,
        some(photograph, 48, 64),
        lambda: np.uint8(binary(70, 50))[..., None],
    ),
    Case(
        "two prompts with a mask each",
        48,
        64,
        4,
        0.7,
        some(photograph, 48, 64),
        lambda: [marks(48, 64), marks(30, 70, seed=2)],
        prompt=[FOX, ROBOT],
        seed=2**33 + 5,
    ),
    Case(
        "images and masks in turn",
        32,
        48,
        5,
        0.8,
        lambda: [photograph(64, 48, 1), photograph(90, 90, 2)],
        lambda: np.stack([binary(32, 48, seed) for seed in (1, 2)]).astype(np.float32),
        prompt=[FOX, ROBOT],
        num_images_per_prompt=2,
        seed=6,
    ),
    Case(
        "negative prompts",
        48,
        96,
        4,
        0.6,
        some(photograph, 96, 96),
        some(marks, 96, 96),
        prompt=[FOX, ROBOT],
        num_images_per_prompt=2,
        true_cfg_scale=2.0,
        negative_prompt=["blurred", ""],
        seed=7,
    ),
)

CROPS = (
    Case(
        "crop",
        64,
        64,
        3,
        0.8,
        some(photograph, 150, 211),
        some(marks, 150, 211),
        padding_mask_crop=9,
        num_images_per_prompt=2,
        seed=8,
    ),
    Case(
        "crop without proportions",
        96,
        32,
        3,
        0.7,
        some(photograph, 60, 150),
        some(marks, 60, 150, "RGB"),
        padding_mask_crop=0,
        seed=9,
    ),
    Case(
        "crop of a tall image",
        32,
        80,
        3,
        1.0,
        some(photograph, 170, 40),
        some(marks, 170, 40, "1"),
        padding_mask_crop=300,
        seed=10,
    ),
)


@pytest.fixture(scope="session")
def open_inpaint_reference(open_reference: Callable[[str], Any]) -> Callable[[str], Any]:
    """`open_inpaint_reference(name)`: diffusers' FluxInpaintPipeline on the same checkpoint."""

    @functools.cache
    def make(name: str) -> Any:
        from diffusers import FluxInpaintPipeline

        pipe = FluxInpaintPipeline.from_pipe(open_reference(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generate(pipe: FluxPipeline, case: Case, **other: Any) -> np.ndarray:
    images = pipe(**{**case.arguments(), "seed": case.seed, "output_type": "np", **other}).images
    return np.asarray(images)


def generate_reference(pipe: Any, case: Case, output_type: str = "np") -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(case.seed)
    return np.asarray(
        pipe(**case.arguments(), generator=generator, output_type=output_type).images
        if output_type == "np"
        else [
            np.asarray(image)
            for image in pipe(**case.arguments(), generator=generator, output_type="pil").images
        ]
    )


def check_equal(pipe: FluxPipeline, reference: Any, case: Case) -> None:
    expected = generate_reference(reference, case)
    pictures = generate(pipe, case)
    assert pictures.shape == expected.shape
    inside = np.mean((expected > 0) & (expected < 1))
    assert inside > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pictures_equal_diffusers(
    case: Case,
    open_pipeline: Callable[..., FluxPipeline],
    open_inpaint_reference: Callable[[str], Any],
) -> None:
    check_equal(open_pipeline("dev"), open_inpaint_reference("dev"), case)


@pytest.mark.parametrize("name", ["schnell", "constant", "wide"])
def test_other_shapes_equal_diffusers(
    name: str,
    open_pipeline: Callable[..., FluxPipeline],
    open_inpaint_reference: Callable[[str], Any],
) -> None:
    check_equal(open_pipeline(name), open_inpaint_reference(name), CASES[-2])


@pytest.mark.parametrize("case", CROPS, ids=lambda case: case.name)
def test_what_is_drawn_around_the_mask_equals_diffusers(
    case: Case,
    open_pipeline: Callable[..., FluxPipeline],
    open_inpaint_reference: Callable[[str], Any],
) -> None:
    expected = generate_reference(open_inpaint_reference("dev"), case, "pil").astype(int)
    pictures = generate(open_pipeline("dev"), case, output_type="pil").astype(int)
    assert pictures.shape == expected.shape
    original = np.asarray(case.image())
    assert np.mean(np.abs(expected - original) > 8) > 0.02, "hardly anything was drawn"
    # A byte that is rounded otherwise is resized after that, with a filter that overshoots.
    difference = np.abs(pictures - expected)
    assert difference.max() <= 2
    assert np.mean(difference > 0) < 0.02
    np.testing.assert_array_equal(np.rint(generate(open_pipeline("dev"), case) * 255), pictures)


def test_crops_are_those_of_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    random = np.random.default_rng(0)
    processor = VaeImageProcessor(vae_scale_factor=16, do_convert_grayscale=True)
    for _ in range(120):
        rows, columns = (int(n) for n in random.integers(1, 90, 2))
        height, width = (int(n) * 16 for n in random.integers(1, 7, 2))
        padding = int(random.choice([0, 1, 7, 40, 200]))
        grey = np.zeros((rows, columns), np.uint8)
        marked = random.integers(0, rows, 2), random.integers(0, columns, 2)
        grey[marked] = random.integers(1, 256, 2)
        mask = Image.fromarray(grey)
        expected = processor.get_crop_region(mask, width, height, pad=padding)
        assert crop_region(grey > 0, height, width, padding) == expected
        image = photograph(rows, columns, 1)
        try:
            filled = [
                np.asarray(processor._resize_and_fill(each.crop(expected), width, height))
                for each in (image, mask)
            ]
        except ValueError:
            continue  # a side of less than a pixel, which is one pixel here
        crop = crop_to_mask(image, mask, height, width, padding)
        np.testing.assert_array_equal(np.asarray(crop.image), filled[0])
        np.testing.assert_array_equal(np.asarray(crop.mask), filled[1])
        drawn = photograph(height, width, 2)
        laid = processor.apply_overlay(mask, image, drawn, expected)
        ours = crop.overlay(np.asarray(drawn, np.float32) / 255)
        np.testing.assert_array_equal(np.rint(ours * 255), np.asarray(laid))


@pytest.mark.parametrize("kind", ["L", "RGB", "1", "P", "I;16", "CMYK", "turned", "animation"])
def test_files_of_masks_are_read_as_diffusers_reads_them(kind: str, tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import load_image

    path = tmp_path / {"CMYK": "mask.tiff", "animation": "mask.gif"}.get(kind, "mask.png")
    mask = marks(50, 70, "L" if kind in ("I;16", "turned", "animation") else kind)
    if kind == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112] = 8
    more: dict[str, dict[str, Any]] = {
        "turned": {"exif": exif},
        "animation": {"save_all": True, "append_images": [Image.new("L", (70, 50), 255)]},
    }
    mask.save(path, **more.get(kind, {}))
    processor = VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    # Of 16 bits diffusers makes all above 255 white.
    loaded = load_image(marks(50, 70) if kind == "I;16" else str(path))
    expected = processor.preprocess(loaded, height=64, width=32).numpy()
    opened, _ = open_mask(path)
    np.testing.assert_array_equal(to_masks(opened, 64, 32)[:, None], expected > 0.5)


class NoiseFirst(Generators):
    """Draws what comes second first, and the first second."""

    def normal(self, shape: Any) -> np.ndarray:
        if not hasattr(self, "later"):
            self.later = super().normal(shape)
            return super().normal(shape)
        return self.later


def forgotten(step: int, latents: Any) -> None:
    """A blend that blends nothing."""


MISTAKES: dict[str, Callable[..., Any]] = {
    "Generators": NoiseFirst,
    "scale_noise": lambda known, noise, sigma: (1 - sigma) * noise + sigma * known,
    "to_masks": lambda mask, height, width: ~to_masks(mask, height, width),
    "Inpainting._blend": lambda *arguments: forgotten,
    "Inpainting._latent_masks": lambda task: task.masks[:, 7::8, 7::8],
}


@pytest.mark.parametrize("formula", MISTAKES)
def test_wrong_formulas_move_the_picture(
    formula: str, open_pipeline: Callable[..., FluxPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(CASES[0], strength=0.8)
    expected = generate(open_pipeline("dev"), case)
    monkeypatch.setattr(f"fluxdeploy.host.tasks.inpainting.{formula}", MISTAKES[formula])
    worst = np.abs(generate(open_pipeline("dev"), case) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"
