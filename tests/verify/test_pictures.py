"""Pictures and layers against PyTorch: what is drawn, and which medians and layers pass."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    Manifest,
    QualityRecord,
)
from fluxdeploy.demo.scenes import arrange
from fluxdeploy.demo.scenes import draw as paint
from fluxdeploy.demo.survey import ask
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from fluxdeploy.verify.layers import LayersReport
from fluxdeploy.verify.pictures import (
    Drawing,
    PictureReport,
    PicturesReport,
    choose_prompts,
    choose_scenes,
    draw,
    judge,
    objects_kept,
)

GATE = QualityRecord(30.0, 0.9, 15.0)
PICTURE = PictureReport("a cat", 0, 35.0, 0.95, 12.0, None, None)


def report(*pictures: PictureReport) -> PicturesReport:
    return PicturesReport(128, 128, 4, GATE, pictures)


def bundle_of(manifest: Manifest, low: int = 16, high: int = 4096) -> Any:
    """Something with a manifest whose decoder makes `low` to `high` pixels."""
    sizes = {symbol: DimensionRange(low, low, high) for symbol in ("H", "W")}
    engine = EngineRecord("onnxruntime", "1", "cpu", "x.onnx", sizes)
    decoder = ComponentRecord("", "fp32", "fp32", (), (), (), (engine,), None)
    return SimpleNamespace(manifest=replace(manifest, components={"vae_decoder": decoder}))


@pytest.mark.parametrize("field", ["psnr", "ssim"])
def test_the_medians_are_held_against_the_gate(field: str) -> None:
    low, high = {"psnr": (5.0, 40.0), "ssim": (0.1, 0.99)}[field]
    bad, good = replace(PICTURE, **{field: low}), replace(PICTURE, **{field: high})
    assert report(bad, good, good).passed
    assert not report(bad, bad, good).passed
    assert not report(bad).passed


def test_equal_pictures_have_an_infinite_median_that_passes() -> None:
    equal = replace(PICTURE, psnr=math.inf, ssim=1.0)
    assert report(equal, equal).passed
    assert report(equal, equal, PICTURE).psnr == math.inf


def test_objects_count_from_twenty_pictures_on() -> None:
    kept = replace(PICTURE, right=True, right_in_pytorch=True)
    lost = replace(kept, right=False)
    assert report(*[kept] * 16, *[lost] * 3).passed
    assert report(*[kept] * 18, *[lost] * 2).passed
    assert not report(*[kept] * 17, *[lost] * 3).passed
    assert report(*[kept] * 17, *[lost] * 3).objects == (0.85, 1.0)
    assert report(PICTURE).objects is None


@pytest.mark.parametrize(
    ("right", "expected", "pictures", "kept"),
    [
        (18, 20, 20, True),
        (17, 20, 20, False),
        (0, 19, 19, True),
        (41, 46, 50, True),
        (40, 46, 50, False),
        (50, 10, 50, True),
        *[(count * 7 // 10, count * 8 // 10, count, True) for count in (20, 30, 70, 300)],
    ],
)
def test_a_tenth_of_many_pictures_may_lose_their_objects(
    right: int, expected: int, pictures: int, kept: bool
) -> None:
    assert objects_kept(right / pictures, expected / pictures, pictures) is kept


def test_one_layer_past_its_gate_fails() -> None:
    layers = {"b": 20.0, "c": 14.9, "a": 30.0}
    assert not LayersReport(layers, 15.0).passed
    assert LayersReport(layers, 14.0).passed
    assert LayersReport(layers, None).passed
    assert LayersReport(layers, 14.0).worst(2) == [("c", 14.9), ("b", 20.0)]


def test_layers_keep_the_networks_order() -> None:
    plain = LayersReport({"b": 20.0, "c": 14.9, "a": 30.0}, 15.0).as_json()
    assert list(plain["sqnr"]) == ["b", "c", "a"]
    assert plain["worst"] == "c"


def test_scenes_are_the_first_held_out_ones_in_the_bundles_own_size(manifest: Manifest) -> None:
    drawing = choose_scenes(bundle_of(manifest), 3)
    questions = ask(20)[:3]
    assert drawing.prompts == tuple(question.prompt for question in questions)
    assert drawing.scenes == tuple(question.scene for question in questions)
    assert (drawing.height, drawing.width, drawing.steps) == (32, 48, 3)


@pytest.mark.parametrize(
    ("low", "high", "side"), [(16, 4096, 256), (512, 2048, 512), (16, 128, 128)]
)
def test_other_pictures_fit_the_engines(manifest: Manifest, low: int, high: int, side: int) -> None:
    drawing = choose_prompts(bundle_of(manifest, low, high), 10)
    assert (drawing.height, drawing.width) == (side, side)
    assert len(set(drawing.prompts)) == 8
    assert drawing.prompts[8:] == drawing.prompts[:2]
    assert drawing.scenes == ()


def test_pictures_are_drawn_from_seeds_in_order(pipe: FluxPipeline) -> None:
    drawing = Drawing(("a", "a", "b"), (), 32, 48, 2)
    advanced: list[float] = []

    class Counting(Progress):
        def task(self, description: str, total: float | None = None) -> Any:
            assert total == 9
            return SimpleNamespace(advance=lambda: advanced.append(1))

    pictures = draw(pipe, drawing, "Drawing", Counting(quiet=True))
    assert len(advanced) == 9
    for seed, picture in enumerate(pictures):
        expected = pipe(
            drawing.prompts[seed],
            height=32,
            width=48,
            num_inference_steps=2,
            seed=seed,
            output_type="np",
        ).images
        np.testing.assert_array_equal(picture, np.asarray(expected)[0])
    assert not np.array_equal(pictures[0], pictures[1])


def test_pictures_are_judged_by_their_scenes() -> None:
    scenes = [question.scene for question in ask(4)]
    rng = np.random.default_rng(0)
    drawings = [arrange(scene, 128, 128, rng) for scene in scenes]
    pictures = [paint(drawing).astype(np.float32) / 255 for drawing in drawings]
    assert judge(pictures, scenes) == [True] * 4
    assert judge([np.zeros((128, 128, 3), np.float32)] * 4, scenes) == [False] * 4
    assert judge(pictures, ()) == [None] * 4
