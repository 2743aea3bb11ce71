"""`fluxdeploy generate` over a whole pipeline, on engines in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.cli import main
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.host.conftest import MemoryEngine
from tests.host.test_image_to_image import engines, manifest

__all__ = ["engines", "manifest"]


@pytest.fixture(autouse=True)
def opened(
    monkeypatch: pytest.MonkeyPatch,
    make_pipeline: Callable[[Manifest], FluxPipeline],
    manifest: Manifest,
) -> FluxPipeline:
    pipe = make_pipeline(manifest)
    monkeypatch.setattr(FluxPipeline, "from_bundle", lambda *arguments: pipe)
    monkeypatch.setattr(FluxPipeline, "close", lambda self: None)
    return pipe


def run(folder: Path, *args: object) -> Result:
    out = ("--out", str(folder / "image.png"), "--max-sequence-length", "16")
    arguments = ["generate", "a fox", *map(str, args), *out]
    return CliRunner().invoke(main, arguments, prog_name="fluxdeploy")


def draw(pipe: FluxPipeline, **options: Any) -> list[np.ndarray]:
    images = pipe("a fox", max_sequence_length=16, **options).images
    return [np.asarray(image) for image in images]


def test_seed_and_index_make_each_picture_again(opened: FluxPipeline, tmp_path: Path) -> None:
    result = run(tmp_path, "--seed", 5, "--num-images", 3)
    assert result.exit_code == 0, result.stderr
    for number in range(3):
        path = tmp_path / f"image-{number}.png"
        made = read_metadata(path)
        again = draw(opened, seed=made.seed, num_images_per_prompt=made.index + 1)[made.index]
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), again)


def test_a_picture_says_what_image_it_began_with(opened: FluxPipeline, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(start)
    result = run(tmp_path, "--image", start, "--strength", 0.4, "--seed", 2, "--json")
    assert result.exit_code == 0, result.stderr
    made = read_metadata(tmp_path / "image.png")
    assert made.strength == 0.4
    assert made.image_sha256 == hashlib.sha256(start.read_bytes()).hexdigest()
    (again,) = draw(opened, image=Image.open(start), strength=0.4, seed=2)
    with Image.open(tmp_path / "image.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), again)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "image.png"), "--json"])
    metadata = json.loads(shown.stdout)["metadata"]
    assert (metadata["strength"], metadata["image_sha256"]) == (0.4, made.image_sha256)


def test_text_to_image_records_no_strength(tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 0
    made = read_metadata(tmp_path / "image.png")
    assert (made.strength, made.image_sha256) == (None, None)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_options_that_do_nothing_are_told_in_a_line(tmp_path: Path, more: list[str]) -> None:
    result = run(tmp_path, "an owl", "--negative-prompt", "fog", "--strength", 0.3, *more)
    assert result.exit_code == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert told == [
        "Warning: `strength` does nothing without `image`.",
        "Warning: `negative_prompt` does nothing unless `true_cfg_scale` is above 1.",
    ]


def test_the_bundles_own_guidance_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
    make_pipeline: Callable[[Manifest], FluxPipeline],
    manifest: Manifest,
    tmp_path: Path,
) -> None:
    pipe = make_pipeline(dataclasses.replace(manifest, guidance_embedding=False))
    monkeypatch.setattr(FluxPipeline, "from_bundle", lambda *arguments: pipe)
    assert "Warning" not in run(tmp_path).stderr
    assert read_metadata(tmp_path / "image.png").guidance_scale == 3.5
    assert "no guidance embedding" in run(tmp_path, "--guidance", 3.5).stderr


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [(b"text", 2, "is not a picture"), (None, 1, "No such file")],
)
def test_a_broken_image_is_refused_first(
    content: bytes | None,
    code: int,
    words: str,
    engines: dict[str, MemoryEngine],
    tmp_path: Path,
) -> None:
    start = tmp_path / "start.png"
    if content is not None:
        start.write_bytes(content)
    result = run(tmp_path, "--image", start)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not any(engine.runs for engine in engines.values())


@pytest.mark.parametrize("as_json", [False, True])
def test_a_prompt_that_is_cut_says_so(tmp_path: Path, as_json: bool) -> None:
    options = ("--max-sequence-length", "16", "--out", str(tmp_path / "image.png"))
    arguments = ["generate", "a fox", "a" * 30, "b" * 30, *options, *["--json"][: int(as_json)]]
    result = CliRunner().invoke(main, arguments, prog_name="fluxdeploy")
    assert result.exit_code == 0, result.stderr
    words = (
        "The prompt is cut: T5 reads 16 of its 31 tokens. Raise `max_sequence_length`, or shorten "
        "it."
    )
    # Two prompts of equal lengths say the same, once.
    assert result.stderr.count(f"Warning: {words}") == 1
    if as_json:
        assert json.loads(result.stdout)["warnings"] == [words]


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1.5", "1e300"])
def test_a_strength_that_cannot_be_is_a_usage_error(
    engines: dict[str, MemoryEngine], tmp_path: Path, value: str
) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "start.png")
    result = run(tmp_path, "--image", tmp_path / "start.png", f"--strength={value}")
    assert result.exit_code == 2
    assert "`strength`" in result.stderr
    assert not any(engine.runs for engine in engines.values())
