"""`fluxdeploy inspect` on bundles, pictures and everything else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fluxdeploy.bundle.manifest import MANIFEST_NAME
from fluxdeploy.cli import main
from fluxdeploy.host.pictures import PictureMetadata, save_picture


def run(*args: object) -> Result:
    return CliRunner().invoke(
        main, ["inspect", *map(str, args)], prog_name="fluxdeploy", env={"COLUMNS": "200"}
    )


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, PictureMetadata]:
    metadata = PictureMetadata(
        prompt="un café [red] :smile: 猫",
        prompt_2="a cat",
        negative_prompt=None,
        negative_prompt_2=None,
        true_cfg_scale=1.0,
        seed=2**64 - 1,
        index=0,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=256,
        height=16,
        width=32,
        strength=0.7,
        image_sha256="cd" * 32,
        mask_sha256="ef" * 32,
        padding_mask_crop=32,
        outpaint=None,
        bundle_hash="ab" * 32,
        fluxdeploy_version="0.1.0",
    )
    path = tmp_path / "image.png"
    save_picture(Image.new("RGB", (32, 16)), path, metadata)
    return path, metadata


def test_a_bundle_is_shown_with_its_components_and_constants(bundle: Path) -> None:
    result = run(bundle)
    assert result.exit_code == 0, result.stderr
    decoder = next(line for line in result.stdout.splitlines() if line.startswith("vae_decoder"))
    assert "bf16" in decoder
    assert "2.1 KiB" in decoder
    assert "onnxruntime 1.31.1 cpu" in decoder
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "engines take least usual most for" in rows
    assert "B prompts or pictures 1 1 4 all" in rows
    assert "W pixels, width 16 64 256 all" in rows
    assert "128 x 64, 4 steps, guidance 3.5, 256 text tokens, strength 0.6" in result.stdout
    assert "exponential shift 0.5 at 256 tokens to 1.15 at 4096" in result.stdout
    assert "tokenizers/clip.json, at most 77 tokens" in result.stdout


@pytest.mark.parametrize("columns", [80, 100, 60])
def test_tables_fit_the_terminal(bundle: Path, columns: int) -> None:
    """No word of a heading or a name is cut."""
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["inspect", str(bundle)])
    lines = result.stdout.splitlines()
    assert all(len(line) <= columns for line in lines)
    assert "…" not in result.stdout
    table = lines[: lines.index("")] if "" in lines else lines
    assert len([line for line in table if line.strip()]) == 2, "a heading, and one line a component"


def test_engines_that_differ_are_told_apart(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    plain = json.loads(path.read_text())
    (engine,) = plain["components"]["vae_decoder"]["engines"]
    other = json.loads(json.dumps(engine)) | {"target": "cuda"}
    other["dimensions"]["B"]["max"] = 8
    plain["components"]["vae_decoder"]["engines"] = [engine, other]
    path.write_text(json.dumps(plain))
    rows = [" ".join(line.split()) for line in run(bundle).stdout.splitlines()]
    assert "B prompts or pictures 1 1 4 vae_decoder on cpu" in rows
    assert "B prompts or pictures 1 1 8 vae_decoder on cuda" in rows
    assert "onnxruntime 1.31.1 cuda" in rows


def test_text_from_a_bundle_is_never_taken_for_markup(bundle: Path) -> None:
    result = run(bundle)
    assert "a [bold]checkpoint[/bold] :smile:" in result.stdout
    assert "my [red] bundle" in result.stdout


def test_json_holds_the_manifest_and_its_hash(bundle: Path) -> None:
    report = json.loads(run(bundle, "--json").stdout)
    data = (bundle / MANIFEST_NAME).read_bytes()
    assert report["manifest"] == json.loads(data)
    assert report["content_hash"] == hashlib.sha256(data).hexdigest()


def test_check_hashes_every_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxdeploy.bundle.SMALL", 0)  # as if every file were large
    result = run(bundle, "--check")
    assert result.exit_code == 0, result.stderr
    assert "every SHA-256 matches" in result.stdout
    changed = bundle / "onnx" / "vae_decoder.onnx"
    changed.write_bytes(b"DECODER" * 300)
    assert run(bundle).exit_code == 0
    result = run(bundle, "--check")
    assert result.exit_code == 1
    assert str(changed) in result.stderr


def test_a_picture_tells_how_it_was_made(picture: tuple[Path, PictureMetadata]) -> None:
    path, metadata = picture
    result = run(path)
    assert result.exit_code == 0, result.stderr
    assert metadata.prompt in result.stdout
    assert "negative_prompt" not in result.stdout
    report = json.loads(run(path, "--json").stdout)
    assert report == {"path": str(path), "metadata": asdict(metadata)}


def test_check_is_refused_for_pictures(picture: tuple[Path, PictureMetadata]) -> None:
    assert run(picture[0], "--check").exit_code == 2


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", 2), (b"hello", 2), (b"\x89PNG\r\n\x1a\n", 1), (b"\x89PNG\r\n\x1a\nnonsense" * 9, 1)],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, code: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    result = run(path)
    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")
    assert str(path) in result.stderr


def test_a_foreign_png_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "foreign.png"
    Image.new("RGB", (16, 16)).save(path)
    result = run(path)
    assert result.exit_code == 1
    assert "does not say how it was made" in result.stderr


def test_a_missing_picture_is_not_taken_for_a_bundle(tmp_path: Path) -> None:
    result = run(tmp_path / "image.png")
    assert result.exit_code == 1
    assert "There is no picture at" in result.stderr


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: There is no bundle at {tmp_path / name}")
