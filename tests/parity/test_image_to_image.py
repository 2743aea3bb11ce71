"""Image to image against diffusers' FluxImg2ImgPipeline, float32, pixel by pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.host.input_images import open_image, to_pixels
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling.noise import Generators

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

TOLERANCE = 0.5 / 255
TENTH = 0.1

FOX = "A red fox on a sandy beach at sunset"
ROBOT = "A huge wooden robot inside a library, at night"


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Colour gradients with a disc and some noise: no two pixels are alike."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = (rows - 0.4) ** 2 + (columns - 0.6) ** 2 < 0.08
    planes = [rows, columns, 1 - rows * columns]
    pixels = 255 * np.stack(planes[seed % 3 :] + planes[: seed % 3], axis=-1)
    pixels[disc] = random.integers(0, 256, 3)
    return Image.fromarray((pixels + random.normal(0, 12, pixels.shape)).clip(0, 255).astype("u1"))


def floats(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(photograph(height, width, seed), np.float32) / 255


@dataclass(frozen=True)
class Case:
    """A call of both pipelines."""

    name: str
    height: int
    width: int
    num_inference_steps: int
    strength: float
    image: Callable[[], Any]
    prompt: str | list[str] = FOX
    num_images_per_prompt: int = 1
    max_sequence_length: int = 32
    guidance_scale: float = 3.5
    true_cfg_scale: float = 1.0
    negative_prompt: str | list[str] | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments that both pipelines take under one name."""
        own = {k: v for k, v in vars(self).items() if k not in ("name", "seed")}
        return own | {"image": self.image()}


def one(height: int, width: int, seed: int = 0) -> Callable[[], Any]:
    return functools.partial(photograph, height, width, seed)


CASES = (
    Case("same size", 64, 48, 4, 0.6, one(64, 48)),
    Case("little noise", 32, 80, 10, 0.3, one(32, 80, 1), seed=1),
    Case("much noise", 48, 48, 5, 0.95, one(48, 48, 2), prompt=ROBOT, seed=2**33 + 1),
    Case("all noise", 32, 48, 3, 1.0, one(32, 48), seed=3),
    Case("the last step alone", 48, 64, 4, 0.1, one(48, 64), seed=4),
    Case("one step", 32, 32, 1, 0.4, one(32, 32), seed=5),
    Case("one image token", 16, 16, 6, 0.5, one(16, 16, 1), seed=6),
    Case("reduced", 64, 64, 4, 0.5, one(150, 211), seed=7),
    Case("enlarged", 96, 48, 4, 0.5, one(37, 23), seed=8),
    Case("floats, resized", 64, 96, 4, 0.5, functools.partial(floats, 41, 130), seed=9),
    Case("a stack of floats", 48, 48, 4, 0.5, lambda: floats(48, 48)[None], seed=10),
    Case("two pictures", 64, 64, 4, 0.7, one(64, 64), num_images_per_prompt=2, seed=11),
    Case("two prompts", 48, 80, 4, 0.55, one(48, 80), prompt=[FOX, ROBOT], seed=12),
    Case(
        "an image each",
        64,
        48,
        5,
        0.5,
        lambda: [photograph(64, 48, 1), photograph(90, 90, 2)],
        prompt=[FOX, ROBOT],
        seed=13,
    ),
    Case(
        "two images for four pictures",
        48,
        48,
        4,
        0.5,
        lambda: [floats(48, 48, 1), floats(48, 48, 2)],
        prompt=[FOX, ROBOT],
        num_images_per_prompt=2,
        seed=14,
    ),
    Case(
        "negative prompts",
        48,
        96,
        4,
        0.6,
        one(96, 96),
        prompt=[FOX, ROBOT],
        num_images_per_prompt=2,
        true_cfg_scale=2.0,
        negative_prompt=["blurred", ""],
        seed=15,
    ),
    Case("long text", 80, 64, 3, 0.7, one(80, 64), max_sequence_length=512, seed=16),
)


@pytest.fixture(scope="session")
def open_image_reference(open_reference: Callable[[str], Any]) -> Callable[[str], Any]:
    """`open_image_reference(name)`: diffusers' FluxImg2ImgPipeline on the same checkpoint."""

    @functools.cache
    def make(name: str) -> Any:
        from diffusers import FluxImg2ImgPipeline

        pipe = FluxImg2ImgPipeline.from_pipe(open_reference(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generate(pipe: FluxPipeline, case: Case, **other: Any) -> np.ndarray:
    arguments = {**case.arguments(), "seed": case.seed, "output_type": "np", **other}
    return np.asarray(pipe(**arguments).images)


def generate_reference(pipe: Any, case: Case, **other: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(case.seed)
    arguments = {**case.arguments(), "generator": generator, "output_type": "np", **other}
    pictures: np.ndarray = pipe(**arguments).images
    return pictures


@pytest.mark.filterwarnings("ignore::fluxdeploy.errors.UnusedArgumentWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["dev", "schnell", "constant", "wide"])
def test_pictures_equal_diffusers(
    name: str,
    case: Case,
    open_pipeline: Callable[..., FluxPipeline],
    open_image_reference: Callable[[str], Any],
) -> None:
    expected = generate_reference(open_image_reference(name), case)
    pictures = generate(open_pipeline(name), case)
    assert pictures.shape == expected.shape
    inside = np.mean((expected > 0) & (expected < 1))
    assert inside > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


def test_the_size_is_the_bundles_where_none_is_asked(
    open_pipeline: Callable[..., FluxPipeline],
) -> None:
    """As in diffusers, which takes the model's own size and not the image's."""
    pipe = open_pipeline("dev")
    defaults = pipe.bundle.manifest.defaults
    small = pipe(
        FOX, image=photograph(32, 32), num_inference_steps=1, seed=1, max_sequence_length=8
    )
    assert [image.size for image in small.images] == [(defaults.width, defaults.height)]


def test_own_latents_are_the_noised_image(
    open_pipeline: Callable[..., FluxPipeline], open_image_reference: Callable[[str], Any]
) -> None:
    case = Case("", 48, 64, 5, 0.6, one(48, 64))
    latents = np.random.default_rng(0).standard_normal((1, 12, 64), np.float32)
    expected = generate_reference(
        open_image_reference("dev"), case, latents=torch.from_numpy(latents)
    )
    with pytest.warns(match="`image` does nothing beside `latents`"):
        pictures = generate(open_pipeline("dev"), case, seed=None, latents=latents)
    assert np.abs(pictures - expected).max() < TOLERANCE


def test_the_callback_gets_diffusers_timesteps(
    open_pipeline: Callable[..., FluxPipeline], open_image_reference: Callable[[str], Any]
) -> None:
    case = Case("", 48, 64, 5, 0.6, one(48, 64))
    seen: dict[str, list[tuple[int, float]]] = {"ours": [], "theirs": []}

    def record(whose: str) -> Callable[..., dict[str, Any]]:
        def callback(pipe: object, step: int, timestep: Any, state: Any) -> dict[str, Any]:
            seen[whose].append((step, float(timestep)))
            return {}

        return callback

    generate(open_pipeline("dev"), case, callback_on_step_end=record("ours"))
    generate_reference(open_image_reference("dev"), case, callback_on_step_end=record("theirs"))
    assert len(seen["ours"]) == 3
    assert seen["ours"] == seen["theirs"]


def save_rgba(path: Path) -> None:
    pixels = np.asarray(photograph(40, 56))
    alpha = (np.arange(40 * 56).reshape(40, 56, 1) % 256).astype(np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(path)


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(40, 56).save(path, exif=exif)


def save_animation(path: Path) -> None:
    photograph(40, 56).save(path, save_all=True, append_images=[photograph(40, 56, 1)])


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "colours and transparency": ("image.png", save_rgba),
    "turned by EXIF": ("image.jpg", save_turned),
    "palette": ("image.png", lambda path: photograph(40, 56).quantize(32).save(path)),
    "grey": ("image.png", lambda path: photograph(40, 56).convert("L").save(path)),
    "CMYK": ("image.jpg", lambda path: photograph(40, 56).convert("CMYK").save(path)),
    "animation": ("image.gif", save_animation),
    "lossless WebP": ("image.webp", lambda path: photograph(40, 56).save(path, lossless=True)),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_as_diffusers_reads_them(kind: str, tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import load_image

    name, save = FILES[kind]
    path = tmp_path / name
    save(path)
    processor = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=16)
    expected = processor.preprocess(load_image(str(path)), height=64, width=32).numpy()
    image, _ = open_image(path)
    np.testing.assert_array_equal(to_pixels(image, 64, 32), expected)
    with Image.open(path) as lazy:
        np.testing.assert_array_equal(to_pixels(lazy, 64, 32), expected)


class NoiseFirst(Generators):
    """Draws what comes second first, and the first second."""

    def normal(self, shape: Any) -> np.ndarray:
        if not hasattr(self, "later"):
            self.later = super().normal(shape)
            return super().normal(shape)
        return self.later


MISTAKES: dict[str, Callable[..., Any]] = {
    "image_to_image.Generators": NoiseFirst,
    "image_to_image.scale_noise": lambda known, noise, sigma: (1 - sigma) * noise + sigma * known,
    "encoding.sample_posterior": lambda mean, logvar, noise: mean,
    "encoding.scale": lambda latents, spec: latents,
}


@pytest.mark.parametrize("name", ["dev", "schnell", "constant", "wide"])
@pytest.mark.parametrize("formula", MISTAKES)
def test_wrong_formulas_move_the_picture(
    formula: str,
    name: str,
    open_pipeline: Callable[..., FluxPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("", 64, 48, 4, 0.6, one(64, 48))
    expected = generate(open_pipeline(name), case)
    monkeypatch.setattr(f"fluxdeploy.host.tasks.{formula}", MISTAKES[formula])
    worst = np.abs(generate(open_pipeline(name), case) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"
