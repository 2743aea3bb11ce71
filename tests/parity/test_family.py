"""Fill, Control and Kontext against diffusers' pipelines of that name, float32, pixel by pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.tasks import control, fill, kontext
from fluxdeploy.sampling import masks
from fluxdeploy.sampling.rope import picture_ids
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, floats, photograph
from tests.parity.test_inpainting import NoiseFirst, binary, marks

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

ADAPTERS = ("image_encoder", "feature_extractor")

USUAL: dict[str, Any] = {
    "prompt": FOX,
    "num_inference_steps": 3,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
}

LATENTS = np.random.default_rng(5).standard_normal((1, 6, 64)).astype(np.float32)

FILLS: dict[str, dict[str, Any]] = {
    "same size": {
        "height": 64,
        "width": 48,
        "image": photograph(64, 48),
        "mask_image": marks(64, 48),
    },
    "resized, some strength": {
        "height": 48,
        "width": 80,
        "image": photograph(99, 70),
        "mask_image": marks(61, 200, "RGB"),
        "strength": 0.7,
        "num_inference_steps": 5,
        "guidance_scale": 30.0,
    },
    "latents": {
        "height": 32,
        "width": 48,
        "image": photograph(32, 48),
        "mask_image": marks(32, 48),
        "strength": 0.7,
        "latents": LATENTS,
    },
    "two prompts with an image and a mask each": {
        "height": 32,
        "width": 48,
        "prompt": [FOX, ROBOT],
        "image": [photograph(32, 48, 1), photograph(40, 40, 2)],
        "mask_image": [marks(32, 48), marks(30, 70, seed=2)],
    },
    "an image with a mask for each prompt": {
        "height": 48,
        "width": 32,
        "prompt": [FOX, ROBOT],
        "num_images_per_prompt": 2,
        "image": photograph(48, 32),
        "mask_image": np.stack([binary(48, 32, seed) for seed in (1, 2)]).astype(np.float32),
    },
}

CONTROLS: dict[str, dict[str, Any]] = {
    "same size": {"height": 64, "width": 48, "control_image": photograph(64, 48)},
    "one for two prompts": {
        "height": 48,
        "width": 80,
        "prompt": [FOX, ROBOT],
        "num_images_per_prompt": 2,
        "control_image": floats(90, 40)[None],
        "guidance_scale": 10.0,
    },
    "one a prompt": {
        "height": 32,
        "width": 32,
        "prompt": [FOX, ROBOT],
        "num_images_per_prompt": 2,
        "control_image": [photograph(32, 32, 1), photograph(50, 60, 2)],
    },
    "latents": {"height": 32, "width": 48, "control_image": photograph(50, 50), "latents": LATENTS},
    "sigmas": {
        "height": 32,
        "width": 64,
        "sigmas": [1.0, 0.8, 0.3],
        "control_image": photograph(32, 64),
    },
}

# Of diffusers the size that is drawn follows from `max_area`, whatever is asked.
KONTEXTS: dict[str, dict[str, Any]] = {
    "a reference": {"max_area": 64 * 48, "height": 64, "width": 48, "image": photograph(70, 50)},
    "another size": {"max_area": 4096, "height": 100, "width": 300, "image": floats(48, 66)[None]},
    "negative prompts": {
        "max_area": 48 * 48,
        "height": 48,
        "width": 48,
        "prompt": [FOX, ROBOT],
        "num_images_per_prompt": 2,
        "negative_prompt": ["blurred", ""],
        "true_cfg_scale": 2.0,
        "image": photograph(40, 40),
    },
    "one a prompt": {
        "max_area": 32 * 64,
        "height": 32,
        "width": 64,
        "prompt": [FOX, ROBOT],
        "image": [photograph(32, 48, 1), photograph(50, 60, 2)],
    },
    "none": {"max_area": 64 * 48, "height": 64, "width": 48},
}

CALLS = [
    *(("fill", name, each) for name, each in FILLS.items()),
    *(("control", name, each) for name, each in CONTROLS.items()),
    *(("kontext", name, each) for name, each in KONTEXTS.items()),
]


@pytest.fixture(scope="session")
def open_family(open_reference: Callable[[str], Any]) -> Callable[[str], Any]:
    """`open_family(name)`: diffusers' pipeline of a task, on the checkpoint of that name."""

    @functools.cache
    def make(name: str) -> Any:
        import diffusers

        kind = getattr(diffusers, f"Flux{name.capitalize()}Pipeline")
        parts = open_reference(name).components
        pipe = kind(**{part: parts[part] for part in parts if part not in ADAPTERS})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe: FluxPipeline, call: dict[str, Any], seed: int = 5) -> np.ndarray:
    call = {**USUAL, **call}
    if "max_area" in call:
        if "image" in call:
            call["auto_resize"] = False
        else:
            del call["max_area"]
    return np.asarray(pipe(**call, seed=seed, output_type="np").images)


def draw_reference(pipe: Any, call: dict[str, Any], seed: int = 5) -> np.ndarray:
    call = {**USUAL, **call}
    if "max_area" in call:
        call["_auto_resize"] = False
    if "latents" in call:
        call["latents"] = torch.from_numpy(call["latents"])
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(**call, generator=generator, output_type="np").images)


@pytest.mark.parametrize(
    ("name", "call"), [(n, c) for n, _, c in CALLS], ids=[f"{n}, {what}" for n, what, _ in CALLS]
)
def test_pictures_equal_diffusers(
    name: str,
    call: dict[str, Any],
    open_pipeline: Callable[..., FluxPipeline],
    open_family: Callable[[str], Any],
) -> None:
    expected = draw_reference(open_family(name), call)
    pictures = draw(open_pipeline(name), call)
    assert pictures.shape == expected.shape
    assert np.mean((expected > 0) & (expected < 1)) > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


def test_kontext_resizes_references_as_diffusers() -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    manifest = SimpleNamespace(
        latents=LatentSpec(16, 2, 8, 0.3611, 0.1159),
        defaults=SimpleNamespace(height=1024, width=1024),
    )
    for width, height in [(30, 70), (100, 100), (101, 100), (3000, 400), (5, 900), (640, 480)]:
        aspect = width / height
        _, w, h = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        expected = (h // 16 * 16, w // 16 * 16)
        arguments = {
            "image": np.zeros((height, width, 3), np.uint8),
            "auto_resize": True,
            "max_area": None,
        }
        assert kontext.Kontext.size(manifest, None, None, arguments) == expected


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "fill, order of draws": ("fill", lambda m: m.setattr(fill, "Generators", NoiseFirst)),
    "fill, order of a mask's pixels": (
        "fill",
        lambda m: m.setattr(
            fill, "mask_channels", lambda x, spec: masks.mask_channels(x, spec)[..., ::-1]
        ),
    ),
    "fill, what is hidden": (
        "fill",
        lambda m: m.setattr(fill, "hide", lambda images, marks: masks.hide(images, ~marks)),
    ),
    "control, order of draws": (
        "control",
        lambda m: m.setattr(control, "Generators", NoiseFirst),
    ),
    "kontext, axis of ids": (
        "kontext",
        lambda m: m.setattr(
            kontext, "picture_ids", lambda *given: np.roll(picture_ids(*given), 1, axis=1)
        ),
    ),
    "kontext, number of a reference": (
        "kontext",
        lambda m: m.setattr(kontext, "picture_ids", lambda *given: picture_ids(*given[:3], 0)),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_formulas_move_the_picture(
    mistake: str, open_pipeline: Callable[..., FluxPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make = MISTAKES[mistake]
    call = next(each for kind, _, each in CALLS if kind == name)
    expected = draw(open_pipeline(name), call)
    make(monkeypatch)
    worst = np.abs(draw(open_pipeline(name), call) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"
