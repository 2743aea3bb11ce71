"""ControlNets against diffusers' FluxControlNetPipeline, float32, pixel by pixel.

The transformer and the ControlNets run in PyTorch, stage by stage as they are exported, so that
many kinds of them cost no trace. tests/parity/test_controlnet_bundle.py builds one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import open_engine
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import ComponentRecord, ControlNetRecord
from fluxdeploy.errors import UnusedArgumentWarning, UsageError
from fluxdeploy.host import residuals
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.tasks import controlnet
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.text import load_tokenizers
from tests.parity.controlnets import CASES
from tests.parity.test_family import ADAPTERS
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, photograph
from tests.parity.test_inpainting import NoiseFirst, marks

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

USUAL: dict[str, Any] = {
    "prompt": FOX,
    "num_inference_steps": 3,
    "max_sequence_length": 16,
    "height": 48,
    "width": 32,
}

PART: dict[str, Any] = {
    "num_inference_steps": 4,
    "control_guidance_start": 0.25,
    "control_guidance_end": 0.75,
}

LATENTS = np.random.default_rng(5).standard_normal((1, 6, 64)).astype(np.float32)

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "same size": ("InstantX", {"control_image": photograph(48, 32)}),
    "resized, a part of the steps": (
        "InstantX",
        {
            "height": 32,
            "width": 80,
            "control_image": photograph(99, 70),
            "controlnet_conditioning_scale": 0.6,
            **PART,
        },
    ),
    "one a prompt": (
        "InstantX",
        {
            "prompt": [FOX, ROBOT],
            "num_images_per_prompt": 2,
            "control_image": [photograph(48, 32, 1), photograph(50, 60, 2)],
        },
    ),
    "one for two prompts, negative prompts": (
        "InstantX",
        {
            "prompt": [FOX, ROBOT],
            "negative_prompt": ["blurred", ""],
            "true_cfg_scale": 2.0,
            "control_image": photograph(40, 40),
            "control_guidance_end": 0.7,
        },
    ),
    "sigmas": (
        "many single blocks, no guidance",
        {"sigmas": [1.0, 0.8, 0.3], "control_image": photograph(48, 32)},
    ),
    "Union": ("Union", {"control_image": photograph(48, 32), "control_mode": 3}),
    "several": (
        "several",
        {
            "control_image": [photograph(48, 32, 1), photograph(40, 60, 2)],
            "control_mode": [2, None],
            "controlnet_conditioning_scale": [0.7, 1.2],
            "control_guidance_start": [0.0, 0.3],
            "control_guidance_end": [0.8, 1.0],
        },
    ),
    "latents": ("InstantX", {"control_image": photograph(40, 40), "latents": LATENTS}),
    "image to image": (
        "InstantX",
        {
            "height": 32,
            "width": 80,
            "prompt": [FOX, ROBOT],
            "image": [photograph(50, 80, 1), photograph(32, 80, 2)],
            "strength": 0.7,
            "control_image": photograph(99, 70),
            **PART,
        },
    ),
    "image to image, several": (
        "several",
        {
            "image": photograph(48, 32, 2),
            "strength": 0.6,
            "control_image": [photograph(48, 32, 1), photograph(40, 60, 2)],
            "control_mode": [2, None],
            "controlnet_conditioning_scale": [0.7, 1.2],
        },
    ),
    "inpainting": (
        "Union",
        {
            "image": photograph(60, 30, 2),
            "mask_image": marks(48, 32),
            "strength": 0.8,
            "control_image": photograph(48, 32),
            "control_mode": 3,
            **PART,
        },
    ),
    "inpainting, pixels": (
        "XLabs",
        {
            "image": photograph(48, 32, 2),
            "mask_image": marks(48, 32),
            "strength": 1.0,
            "control_image": photograph(48, 32),
        },
    ),
    "XLabs": (
        "XLabs",
        {
            "prompt": [FOX, ROBOT],
            "control_image": [photograph(48, 32, 1), photograph(50, 60, 2)],
            "controlnet_conditioning_scale": 1.4,
        },
    ),
}


@pytest.fixture(scope="session")
def open_controlled(
    bundle: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    controlnet_folders: Callable[[str], tuple[Path, ...]],
) -> Callable[[str], FluxPipeline]:
    """`open_controlled(case)`: ours, with the chains of transformer and ControlNets in PyTorch."""
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.controlnet import with_controlnets
    from exporters.components.registry import components_of
    from tests.support.chain_engines import ChainEngine

    def make(case: str) -> FluxPipeline:
        name, _ = CASES[case]
        plain = open_bundle(bundle(name))
        opened = with_controlnets(open_checkpoint(checkpoint(name)), controlnet_folders(case))
        engines = {
            each.name: ChainEngine(*each.source(opened, "fp32"))
            for each in components_of(opened).values()
            if each.part.startswith(("transformer", "controlnet")) and each.present(opened)
        }
        del engines["conditioner"]
        records = {
            each: ComponentRecord("", "fp32", "fp32", e.inputs, e.outputs, (), (), None)
            for each, e in engines.items()
        }
        manifest = replace(
            plain.manifest,
            components={**plain.manifest.components, **records},
            tasks=(*plain.manifest.tasks, "controlnet"),
            controlnets=tuple(
                ControlNetRecord(part, config.modes)
                for part, config in zip(opened.controlnet_parts, opened.controlnets, strict=True)
            ),
        )
        changed = replace(plain, manifest=manifest)

        def open_component(component: str) -> Any:
            return engines.get(component) or open_engine(changed, component)

        return FluxPipeline(changed, load_tokenizers(plain), open_component)

    return functools.cache(make)


def draw(pipe: FluxPipeline, call: dict[str, Any], seed: int = 5) -> np.ndarray:
    return np.asarray(pipe(**{**USUAL, **call}, seed=seed, output_type="np").images)


def as_asked(pipe: Any, call: dict[str, Any]) -> Any:
    """diffusers' pipeline for what a call has beside its control picture."""
    import diffusers

    if "image" not in call:
        return pipe
    kind = diffusers.FluxControlNetImg2ImgPipeline
    if "mask_image" in call:
        kind = diffusers.FluxControlNetInpaintPipeline
    other = kind(**{n: part for n, part in pipe.components.items() if n not in ADAPTERS})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("name", CALLS)
def test_pictures_equal_diffusers(
    name: str,
    open_controlled: Callable[[str], FluxPipeline],
    open_reference_controlled: Callable[[str], Any],
) -> None:
    case, call = CALLS[name]
    guidance = open_controlled(case).bundle.manifest.defaults.guidance_scale
    generator = torch.Generator("cpu").manual_seed(5)
    reference = {"guidance_scale": guidance, **USUAL, **call}
    if "latents" in call:
        reference["latents"] = torch.from_numpy(call["latents"])
    expected = as_asked(open_reference_controlled(case), call)(
        **reference, generator=generator, output_type="np"
    ).images
    pictures = draw(open_controlled(case), call)
    assert pictures.shape == expected.shape
    assert np.mean((expected > 0) & (expected < 1)) > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


def test_without_control_the_plain_model_draws(
    open_controlled: Callable[[str], FluxPipeline], open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    worst = np.abs(draw(open_controlled("Union"), {}) - draw(open_pipeline("dev"), {})).max()
    assert worst < TOLERANCE


def test_a_controlnet_is_not_run_where_it_does_not_count(
    open_controlled: Callable[[str], FluxPipeline],
) -> None:
    pipe = open_controlled("Union")
    engine: Any = pipe._components.engine("controlnet")
    call = {"control_image": photograph(48, 32), "control_mode": 1, **PART}
    before = engine.runs
    draw(pipe, call)
    assert engine.runs == before + 2
    before = engine.runs
    draw(pipe, {**call, "sampler": "heun"})
    # Heun takes the velocity where a step begins and where it ends.
    assert engine.runs == before + 4
    before = engine.runs
    with pytest.warns(UnusedArgumentWarning, match="in none of 4 steps"):
        nothing = draw(pipe, {**call, "controlnet_conditioning_scale": 0.0})
    assert engine.runs == before
    assert np.abs(nothing - draw(pipe, call)).max() > TENTH


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.25, 0.75), (0.3, 1), (0.5, 0.5), (0.1, 0.9)])
@pytest.mark.parametrize("steps", [1, 4, 7, 28])
def test_the_steps_in_which_it_counts_are_diffusers(start: float, end: float, steps: int) -> None:
    given = controlnet.Controlled(np.zeros((1, 3, 8, 8), np.float32), None, 0.7, start, end)
    found = controlnet._scales(given, steps)
    for i in range(steps):
        keep = 1.0 - float(i / steps < start or (i + 1) / steps > end)
        assert found[i] == np.float32(0.7 * keep)


def a_step_late(patch: pytest.MonkeyPatch) -> None:
    def scales(given: controlnet.Controlled, steps: int) -> Any:
        return np.roll(usual(given, steps), 1)

    usual = controlnet._scales
    patch.setattr(controlnet, "_scales", scales)


def second_from_the_second_block_on(patch: pytest.MonkeyPatch) -> None:
    def rows(nets: object, kind: str, blocks: int) -> list[int]:
        return [min(block, 1) if kind == "double" else 0 for block in range(blocks)]

    patch.setattr("exporters.components.mmdit.residual_rows", rows)


def none_for_negative_prompts(patch: pytest.MonkeyPatch) -> None:
    def recall(self: Any, level: int, latents: np.ndarray, part: slice) -> Any:
        return residuals.zero_residuals(self._transformer, *latents.shape[:2])

    patch.setattr(residuals.ControlResiduals, "recall", recall)


def without_a_mode(patch: pytest.MonkeyPatch) -> None:
    def run(self: Any, net: Any, level: int, latents: np.ndarray, part: slice) -> Any:
        other = replace(net, condition=replace(net.condition, mode=0 * net.condition.mode))
        return usual(self, other, level, latents, part)

    usual = residuals.ControlResiduals._run
    patch.setattr(residuals.ControlResiduals, "_run", run)


def noise_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(controlnet, "Generators", NoiseFirst)


def picture_first(patch: pytest.MonkeyPatch) -> None:
    def inputs(task: Any, given: Any, generator: Any, run: Any) -> Any:
        return usual(task, given, Generators(task.request.seed + 1), run)

    usual = controlnet._inputs
    patch.setattr(controlnet, "_inputs", inputs)


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "order of draws": ("same size", noise_first),
    "steps in which it counts": ("resized, a part of the steps", a_step_late),
    "residuals of negative prompts": (
        "one for two prompts, negative prompts",
        none_for_negative_prompts,
    ),
    "order of draws beside an image": ("image to image", picture_first),
    "steps that count beside an image": ("image to image", a_step_late),
    "mode": ("Union", without_a_mode),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_formulas_move_the_picture(
    mistake: str,
    open_controlled: Callable[[str], FluxPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, make = MISTAKES[mistake]
    case, call = CALLS[name]
    pipe = open_controlled(case)
    expected = draw(pipe, call)
    make(monkeypatch)
    worst = np.abs(draw(pipe, call) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"


def test_another_residual_after_a_block_moves_the_picture(
    open_controlled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, call = CALLS["same size"]
    expected = draw(open_controlled(case), call)
    second_from_the_second_block_on(monkeypatch)
    # Opened anew, for which residual it is is part of the graph.
    worst = np.abs(draw(open_controlled.__wrapped__(case), call) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"


IMAGE = np.zeros((48, 32, 3), np.uint8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Union", {"control_image": IMAGE}, "tells 5 kinds of control apart. Give `control_mode`"),
    ("Union", {"control_image": IMAGE, "control_mode": 5}, "control_mode"),
    ("InstantX", {"control_image": IMAGE, "control_mode": 1}, "knows one kind of control"),
    ("InstantX", {"control_image": [IMAGE] * 3}, "3 control images for 1 prompts"),
    ("InstantX", {"control_image": IMAGE, "control_guidance_end": 1.5}, "control_guidance_end"),
    (
        "InstantX",
        {"control_image": IMAGE, "controlnet_conditioning_scale": [1.0, 2.0]},
        "has 2 entries, and this bundle 1 ControlNets",
    ),
    ("several", {"control_image": IMAGE}, "has 2 ControlNets. Give `control_image` as a list"),
    (
        "InstantX",
        {
            "control_image": IMAGE,
            "image": Image.fromarray(IMAGE),
            "mask_image": Image.fromarray(IMAGE),
            "padding_mask_crop": 8,
        },
        "`padding_mask_crop` has no place beside",
    ),
]


@pytest.mark.parametrize(("case", "call", "said"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    case: str, call: dict[str, Any], said: str, open_controlled: Callable[[str], FluxPipeline]
) -> None:
    with pytest.raises(UsageError, match=said):
        draw(open_controlled(case), call)


def test_one_for_all_and_a_mode_for_those_that_have_one() -> None:
    records: Sequence[Any] = [ControlNetRecord("controlnet", 3), ControlNetRecord("b", 0)]
    assert controlnet._modes({"control_mode": 2}, records) == [2, None]
    assert controlnet._modes({"control_mode": [2, None]}, records) == [2, None]
    assert controlnet._modes({"control_mode": 2}, records[1:]) == [2]
