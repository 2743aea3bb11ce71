"""What docs/family.md tells to type draws, with bundles of random checkpoints of each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.bench.choose import BenchRequest, choose_contenders
from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from tests.docs.pages import ROOT, code_blocks, tables
from tests.docs.test_pages_run import command_lines

PAGE = ROOT / "docs" / "family.md"
SIZE = ["--width", "64", "--height", "48", "--steps", "2", "--max-sequence-length", "16"]
BUNDLES = {"fill": "fill", "canny": "control", "kontext": "kontext"}


@pytest.fixture
def workplace(
    tmp_path: Path,
    bundle: Callable[[str], Path],
    redux_bundle: Path,
    ip_adapter_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    pytest.importorskip("torch")
    for name, kind in BUNDLES.items():
        (tmp_path / name).symlink_to(bundle(kind), target_is_directory=True)
    (tmp_path / "demo-kontext").symlink_to(bundle("kontext"), target_is_directory=True)
    for name, found in {"dev-redux": redux_bundle, "dev-ip": ip_adapter_bundle}.items():
        (tmp_path / name).symlink_to(found, target_is_directory=True)
    for name in ("room", "wall", "beach", "house", "edges", "ring", "star"):
        image = Image.new("RGB", (70, 50), "white")
        image.paste("black", (10, 10, 40, 30))
        image.save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_draw(workplace: Path) -> None:
    pytest.importorskip("cv2")
    for line in command_lines(PAGE):
        if line[0] == "build":
            continue
        # A reference of training size would take a minute here.
        small = [*SIZE, "--no-auto-resize"] if "kontext" in line else SIZE
        (workplace / "image.png").unlink(missing_ok=True)
        result = CliRunner().invoke(main, [*line, *small])
        assert result.exit_code == 0, f"{line}: {result.output}"
        assert (workplace / "image.png").is_file(), line


def test_the_python_example_draws(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = FluxPipeline.__call__
    drawn = []

    def small(pipe: FluxPipeline, *prompts: str, **arguments: object) -> object:
        usual = {"height": 48, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}
        resize = {"auto_resize": False} if "kontext" in pipe.bundle.manifest.tasks else {}
        drawn.append(draw(pipe, *prompts, **{**usual, **resize, **arguments}))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(FluxPipeline, "__call__", small)
    (code,) = code_blocks(PAGE, "python")
    exec(compile(code, "docs/family.md", "exec"), {})
    assert len(drawn) == 8


def test_the_table_has_what_bundles_record(workplace: Path) -> None:
    (table,) = tables(PAGE.read_text())
    for row, name in zip(table[1:], BUNDLES, strict=True):
        manifest = open_bundle(workplace / name).manifest
        assert int(row[1].split()[0]) == manifest.latents.channels_read(manifest.tasks[-1])
        assert row[2] == ", ".join(manifest.tasks)
        guidance, steps = (float(each) for each in row[3].split(","))
        defaults = manifest.defaults
        assert (defaults.guidance_scale, defaults.num_inference_steps) == (guidance, steps)


def test_what_draws_from_text_alone_refuses_other_bundles(workplace: Path) -> None:
    request = BenchRequest((workplace / "fill",), (), None, "auto", None, None, 1, None)
    with pytest.raises(UsageError, match=r"`bench` draws from text alone, .* one for fill"):
        choose_contenders(request, Progress(quiet=True))
    result = CliRunner().invoke(main, ["tune", "--bundle", "fill"])
    assert result.exit_code == 2
    assert "`tune` draws from text alone" in result.stderr
    result = CliRunner().invoke(main, ["generate", "a fox", "--bundle", "fill", *SIZE])
    assert "one for fill (with `image` and `mask_image`)" in result.stderr
