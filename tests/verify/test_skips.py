"""Which steps are skipped is found without the transformer, and written without harm."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engines import choose_edition
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import SkipRecord
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError
from fluxdeploy.verify.skips import skip_paths, write_skips
from tests.support.editions import with_editions
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

pytestmark = pytest.mark.filterwarnings("ignore::fluxdeploy.errors.CutPromptWarning")

RECORD = SkipRecord("euler", 4, (1, 3), 1, 128, 128, 34.0, 35.5, 4)


def test_steps_go_first_where_the_velocity_is_extrapolated_best() -> None:
    sigmas = np.linspace(1, 0, 9, dtype=np.float32)
    # A line until the last third, and a jump there.
    velocities = np.stack([sigmas[:-1], sigmas[:-1]], axis=1)
    velocities[6] += 5
    path = skip_paths([velocities], sigmas, 1)
    assert [len(skipped) for skipped in path] == list(range(8))
    assert all(6 not in skipped for skipped in path[:4])
    assert all(0 not in skipped for skipped in path)
    assert all(set(a) < set(b) for a, b in itertools.pairwise(path))


def test_a_record_takes_the_place_of_one_for_the_same_calls(
    demo_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    opened = open_bundle(folder)
    write_skips(opened, RECORD)
    again = open_bundle(folder)
    assert dataclasses.replace(again.manifest, skips=()) == opened.manifest
    assert again.manifest.skips == (RECORD,)
    other = dataclasses.replace(RECORD, steps=(2,))
    write_skips(again, other)
    assert open_bundle(folder).manifest.skips == (other,)
    # The one that was opened first is not there any more.
    with pytest.raises(BundleError, match="open it again"):
        write_skips(opened, RECORD)


def test_a_record_goes_to_the_edition_that_was_run(tmp_path: Path) -> None:
    files = small_files()
    whole = with_editions(small_manifest(files), "onnxruntime", "openvino")
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle", files, whole))
    write_skips(choose_edition(bundle, "openvino"), RECORD)
    found = open_bundle(tmp_path / "bundle").manifest
    assert [each.skips for each in found.each()] == [(), (RECORD,)]
    assert dataclasses.replace(found, editions=whole.editions) == whole


def test_what_tune_finds_is_what_generate_uses(demo_bundle: Path, tmp_path: Path) -> None:
    folder, prompts, out = tmp_path / "bundle", tmp_path / "prompts.txt", tmp_path / "star.png"
    shutil.copytree(demo_bundle, folder)
    prompts.write_text("a red star\na blue ring\n\na green cross\n")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    given = ("--bundle", folder, "--prompts", prompts, "--steps", 8, "--size", "48x32")
    run("tune", *given, "--psnr", 20)
    (record,) = open_bundle(folder).manifest.skips
    assert record.psnr >= 20
    assert record.steps
    size = ("--width", 48, "--height", 32, "--steps", 8, "--seed", 1)
    drawn = json.loads(
        run(
            "generate",
            "a star",
            "--bundle",
            folder,
            *size,
            "--skip",
            "auto",
            "--out",
            out,
            "--json",
        )
    )
    assert drawn["warnings"] == []
    refused = CliRunner().invoke(
        main, ["generate", "a star", "--bundle", str(folder), "--steps", "5", "--skip", "auto"]
    )
    assert refused.exit_code == 2
    assert "8" in refused.output

    manifest = open_bundle(folder).manifest
    nothing = CliRunner().invoke(main, ["tune", *map(str, given), "--psnr", "100"])
    assert nothing.exit_code == 1
    assert "Nothing was written" in nothing.output
    assert open_bundle(folder).manifest == manifest
