"""`fluxdeploy generate`: what it asks of the pipeline, and what it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from engines import EngineOptions
from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from fluxdeploy.errors import Cancelled, NumericError
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline, FluxPipelineOutput


class FakePipeline:
    """Stands in for `FluxPipeline`: records its arguments and returns grey pictures."""

    opened: list[tuple[Any, ...]]
    calls: list[dict[str, Any]]
    error: Exception | None

    def __init__(self, root: Path) -> None:
        self.bundle = open_bundle(root)

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, prompt: str, **arguments: Any) -> FluxPipelineOutput:
        if arguments.pop("cancel", None) is not None:
            raise Cancelled  # a look at the arguments
        FakePipeline.calls.append({"prompt": prompt, **arguments})
        steps = arguments["num_inference_steps"]
        for step in range(steps):
            arguments["callback_on_step_end"](self, step, 1000.0, {"latents": None})
        if FakePipeline.error is not None:
            raise FakePipeline.error
        size = (arguments["width"] or 128, arguments["height"] or 64)
        images = [Image.new("RGB", size) for _ in range(arguments["num_images_per_prompt"])]
        seed = arguments["seed"]
        return FluxPipelineOutput(images, 99 if seed is None else seed, {})


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    def from_bundle(path: Path, runtime: str, options: Any, low_vram: bool) -> FakePipeline:
        FakePipeline.opened.append((path, runtime, options, low_vram))
        return FakePipeline(path)

    FakePipeline.opened, FakePipeline.calls, FakePipeline.error = [], [], None
    monkeypatch.setattr(FluxPipeline, "from_bundle", from_bundle)
    return FakePipeline


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, args)], prog_name="fluxdeploy")


def test_every_option_reaches_the_pipeline(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.base.usable_cpus", lambda: 2)
    out = tmp_path / "fox.png"
    Image.new("RGB", (20, 10), (1, 2, 3)).save(tmp_path / "start.png")
    options = (
        "--prompt-2 owl --negative-prompt-2 fog --negative-prompt blur "
        "--true-cfg-scale 2 --width 32 --height 48 --steps 3 --guidance 4.5 "
        "--seed 7 --num-images 2 --max-sequence-length 128 --runtime onnxruntime --threads 2 "
        "--device 1 --low-vram --strength 0.5 --sampler ab2 --skip 1,2 "
        "--control-mode 3 --control-mode 4 --controlnet-scale 0.6 --control-start 0.1 "
        "--control-end 0.9"
    )
    start = ("--image", tmp_path / "start.png")
    result = run("a fox", "--bundle", bundle, "--out", out, *start, *options.split())
    assert result.exit_code == 0, result.stderr
    assert FakePipeline.opened == [(bundle, "onnxruntime", EngineOptions(2, 1), True)]
    (call,) = FakePipeline.calls
    del call["callback_on_step_end"]
    image = call.pop("image")
    assert (image.size, image.getpixel((0, 0))) == ((20, 10), (1, 2, 3))
    assert "32x48, seed 7, 2 of 3 steps, " in result.stderr
    assert call == {
        "prompt": "a fox",
        "prompt_2": "owl",
        "negative_prompt": "blur",
        "negative_prompt_2": "fog",
        "true_cfg_scale": 2.0,
        "width": 32,
        "height": 48,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "seed": 7,
        "num_images_per_prompt": 2,
        "sampler": "ab2",
        "lora": (),
        "skip": (1, 2),
        "strength": 0.5,
        "mask_image": None,
        "padding_mask_crop": None,
        "control_image": None,
        "control_mode": [3, 4],
        "controlnet_conditioning_scale": 0.6,
        "control_guidance_start": 0.1,
        "control_guidance_end": 0.9,
        "redux_image": None,
        "max_area": None,
        "auto_resize": True,
        "max_sequence_length": 128,
    }
    assert sorted(path.name for path in tmp_path.glob("fox*")) == ["fox-0.png", "fox-1.png"]


def test_the_bundle_has_the_defaults(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    result = run("a fox", "--bundle", bundle, "--out", out)
    assert result.exit_code == 0, result.stderr
    (call,) = FakePipeline.calls
    assert call["num_inference_steps"] == 4
    assert call["max_sequence_length"] == 256
    metadata = read_metadata(out)
    assert metadata.guidance_scale == 3.5
    assert metadata.num_inference_steps == 4
    assert (metadata.width, metadata.height) == (128, 64)
    assert metadata.bundle_hash == open_bundle(bundle).content_hash
    assert result.stdout == f"{out}\n"
    assert f"seed {metadata.seed}," in result.stderr


def test_json_is_all_that_is_printed(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    result = run("a fox", "--bundle", bundle, "--out", out, "--seed", "5", "--json")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report.pop("seconds") >= 0
    assert report == {
        "paths": [str(out)],
        "prompts": ["a fox"],
        "sheet": None,
        "seed": 5,
        "seeds": [5],
        "width": 128,
        "height": 64,
        "steps": 4,
        "warnings": [],
    }


def test_what_a_library_prints_is_not_on_stdout(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = FakePipeline.__call__

    def chatty(self: FakePipeline, prompt: str, **arguments: Any) -> FluxPipelineOutput:
        print("[ WARNING ] noise of a library")
        return draw(self, prompt, **arguments)

    monkeypatch.setattr(FakePipeline, "__call__", chatty)
    result = run("a fox", "--bundle", bundle, "--out", tmp_path / "image.png", "--json")
    assert json.loads(result.stdout)["paths"]
    assert "noise of a library" in result.stderr


def test_several_prompts_are_drawn_with_one_seed(bundle: Path, tmp_path: Path) -> None:
    """So that each picture is the one that its own metadata make again."""
    out, sheet = tmp_path / "image.png", tmp_path / "sheet.png"
    options = ("--num-images", 2, "--out", out, "--sheet", sheet, "--json")
    result = run("a fox", "an owl", "--bundle", bundle, *options)
    assert result.exit_code == 0, result.stderr
    assert [call["prompt"] for call in FakePipeline.calls] == ["a fox", "an owl"]
    (seed,) = {call["seed"] for call in FakePipeline.calls}
    assert {call["num_images_per_prompt"] for call in FakePipeline.calls} == {2}
    paths = [tmp_path / f"image-{number}.png" for number in range(4)]
    made = [(m.prompt, m.index, m.seed) for m in map(read_metadata, paths)]
    assert made == [(p, n, seed) for p in ("a fox", "an owl") for n in (0, 1)]
    report = json.loads(result.stdout)
    assert report["paths"] == [str(path) for path in paths]
    assert report["prompts"] == ["a fox", "a fox", "an owl", "an owl"]
    assert report["sheet"] == str(sheet)
    with Image.open(sheet) as image:
        assert image.width > 2 * 128


def test_several_seeds_are_calls_of_their_own(bundle: Path, tmp_path: Path) -> None:
    """So that each picture is the one that its own metadata make again, of an image too."""
    out = tmp_path / "fox.png"
    options = ("--seed", "7,0, 2", "--num-images", 2, "--prompt-2", "red", "--out", out, "--json")
    result = run("a fox", "an owl", "--bundle", bundle, *options)
    assert result.exit_code == 0, result.stderr
    assert [(call["prompt"], call["seed"]) for call in FakePipeline.calls] == [
        *(("a fox", 7), ("a fox", 0), ("a fox", 2)),
        *(("an owl", 7), ("an owl", 0), ("an owl", 2)),
    ]
    report = json.loads(result.stdout)
    assert report["seeds"] == [7, 7, 0, 0, 2, 2] * 2
    assert report["seed"] is None
    for number, (path, seed) in enumerate(zip(report["paths"], report["seeds"], strict=True)):
        assert Path(path).name == f"fox-{number}-seed{seed}.png"
        made = read_metadata(Path(path))
        assert (made.seed, made.index, made.prompt_2) == (seed, number % 2, "red")


@pytest.mark.parametrize("seeds", ["1,", "a", "1,-2", "1;2", "", "1.5", f"3,{2**64}", "-1"])
def test_bad_seeds_are_refused_before_anything_runs(
    bundle: Path, tmp_path: Path, seeds: str
) -> None:
    result = run("a fox", "--bundle", bundle, "--out", tmp_path / "x.png", f"--seed={seeds}")
    assert result.exit_code == 2
    assert "seed" in result.stderr
    assert FakePipeline.calls == []


def test_the_sheet_is_named_last(bundle: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "image.png", tmp_path / "sheet.png"
    result = run("a fox", "--bundle", bundle, "--out", out, "--sheet", sheet)
    assert result.stdout.splitlines() == [str(out), str(sheet)]


@pytest.mark.parametrize(
    ("sheet", "words"),
    [
        ("sheet.jpg", ".png"),
        ("folder.png", "--sheet"),
        ("no-such-folder/sheet.png", "--sheet"),
        ("image-1.png", "the name of a picture"),
        ("link/image-0.png", "the name of a picture"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused_first(
    bundle: Path, tmp_path: Path, sheet: str, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    out = tmp_path / "image.png"
    result = run("a", "b", "--bundle", bundle, "--out", out, "--sheet", tmp_path / sheet)
    assert result.exit_code == 2
    assert words in result.stderr
    assert FakePipeline.opened == []


@pytest.mark.parametrize(
    "name", ["image.jpg", "no-such-folder/image.png", "folder.png", "file/x.png"]
)
def test_a_place_that_cannot_hold_a_picture_is_refused_first(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    result = run("a fox", "--bundle", bundle, "--out", tmp_path / name)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert FakePipeline.opened == []


def test_an_unwritable_folder_is_refused_first(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder's mode does not stop root, so ask a stand-in.
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    result = run("a fox", "--bundle", bundle, "--out", tmp_path / "image.png")
    assert result.exit_code == 1
    assert f"No permission to use {tmp_path}" in result.stderr
    assert FakePipeline.opened == []


def test_a_failed_run_writes_no_picture(bundle: Path, tmp_path: Path) -> None:
    FakePipeline.error = NumericError("transformer gave NaN at step 3.")
    result = run("a fox", "--bundle", bundle, "--out", tmp_path / "image.png")
    assert result.exit_code == 1
    assert "transformer gave NaN at step 3." in result.stderr
    assert list(tmp_path.glob("*.png")) == []


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    result = run("a fox", "--bundle", tmp_path / "missing", "--out", tmp_path / "image.png")
    assert result.exit_code == 1
    assert "no bundle" in result.stderr


def test_more_threads_than_the_machine_has_are_a_usage_error(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    result = run("a fox", "--bundle", bundle, "--out", out, "--threads", 10_000)
    assert result.exit_code == 2
    assert "logical CPUs that this process may use" in result.stderr
    assert FakePipeline.opened == []


@pytest.mark.parametrize("option", ["--num-images=0", "--threads=0", "--steps=x", "--seed=1.5"])
def test_values_that_cannot_be_right_are_usage_errors(option: str) -> None:
    assert run("a fox", option).exit_code == 2
