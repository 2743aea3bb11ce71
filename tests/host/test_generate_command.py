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
from rich.console import Console
from rich.style import Style

from fluxdeploy.bundle.manifest import Manifest, PreviewSpec
from fluxdeploy.cli import generate, main, previews
from fluxdeploy.host import pictures
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
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


@pytest.fixture
def linear(
    monkeypatch: pytest.MonkeyPatch,
    make_pipeline: Callable[[Manifest], FluxPipeline],
    manifest: Manifest,
) -> FluxPipeline:
    """A bundle with a map from latents to colours."""
    preview = PreviewSpec(((0.1, 0.2, -0.1),) * 16, (0.5, 0.5, 0.5))
    pipe = make_pipeline(dataclasses.replace(manifest, preview=preview))
    monkeypatch.setattr(FluxPipeline, "from_bundle", lambda *arguments: pipe)
    return pipe


def test_each_step_replaces_the_file_of_previews(
    linear: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bytes] = []
    write = pictures.write_png

    def watch(image: Image.Image, path: Path) -> None:
        assert path == tmp_path / "now.png"
        write(image, path)
        shown.append(path.read_bytes())

    monkeypatch.setattr(pictures, "write_png", watch)
    result = run(tmp_path, "--seed", 3, "--num-images", 2, "--preview", tmp_path / "now.png")
    assert result.exit_code == 0, result.stderr
    assert len(set(shown)) == 3
    with Image.open(tmp_path / "now.png") as image:
        assert image.size == (48, 64)
    assert not list(tmp_path.glob(".*"))


def test_a_terminal_shows_each_step_above_the_bar(
    linear: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(generate, "check_terminal", lambda as_json: None)
    monkeypatch.setattr(Progress, "live", Console(width=100, height=30))
    monkeypatch.setattr(Progress, "put_above", lambda self, what: shown.append(what))
    result = run(tmp_path, "--seed", 3, "--preview", "terminal")
    assert result.exit_code == 0, result.stderr
    assert len(shown) == 3
    lines = str(shown[-1]).splitlines()
    assert (len(lines), len(lines[0])) == (16, 48)


def test_a_half_block_has_the_colours_of_two_pixels() -> None:
    image = Image.new("RGB", (2, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    text = previews.half_blocks(image, 2, 1)
    assert text.plain == "▀▀\n"
    left = Style.parse(str(text.spans[0].style))
    assert left.color is not None
    assert left.bgcolor is not None
    assert left.color.triplet == (255, 0, 0)
    assert left.bgcolor.triplet == (0, 0, 255)


@pytest.mark.parametrize("size", [(2, 512), (512, 2), (64, 48)])
def test_a_preview_stays_within_the_terminal(size: tuple[int, int]) -> None:
    lines = previews.half_blocks(Image.new("RGB", size), 30, 8).plain.splitlines()
    assert 1 <= len(lines) <= 8
    assert all(1 <= len(line) <= 30 for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preview", "terminal"], "stderr is none"),
        (["--preview", "terminal", "--json"], "--json shows none"),
        (["--preview", "now.jpg"], "End the name in .png"),
        (["--preview", "image.png"], "also the name of a picture"),
        (["--preview", "sheet.png", "--sheet", "sheet.png"], "also the name of a picture"),
        (["--preview", "no-such-folder/now.png"], "Make it first"),
    ],
)
def test_previews_that_cannot_be_shown_are_refused_first(
    linear: FluxPipeline,
    engines: dict[str, MemoryEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(Path(), *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not any(engine.runs for engine in engines.values())


def test_a_bundle_without_a_map_says_how_to_make_one(
    engines: dict[str, MemoryEngine], tmp_path: Path
) -> None:
    """Once, and not for each line of a file."""
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")
    for drawn in (["a fox"], ["--prompts", str(tmp_path / "prompts.txt")]):
        options = ["--preview", str(tmp_path / "now.png"), "--out", str(tmp_path / "x.png")]
        result = CliRunner().invoke(main, ["generate", *drawn, *options])
        assert result.exit_code == 2
        assert "`fluxdeploy build`" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not any(engine.runs for engine in engines.values())


def test_a_grid_encodes_its_prompt_once_and_draws_what_calls_draw(
    opened: FluxPipeline, tmp_path: Path
) -> None:
    axes = ("--grid", "guidance=1,5", "--grid", "steps=2,3")
    result = run(tmp_path, *axes, "--seed", 3, "--sheet", tmp_path / "grid.png")
    assert result.exit_code == 0, result.stderr
    assert opened.stats.prompt_misses == 2, "CLIP and T5, once each"
    assert opened.stats.pictures == 4
    (alone,) = draw(opened, seed=3, guidance_scale=5.0, num_inference_steps=2)
    with Image.open(tmp_path / "image-guidance5-steps2.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), alone)
    assert read_metadata(tmp_path / "image-guidance5-steps2.png").guidance_scale == 5.0
