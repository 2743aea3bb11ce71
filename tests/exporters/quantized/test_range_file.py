"""Files of activation ranges and of prompts: what is written comes back, all else is refused."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")

from exporters.calibrate.range_file import read_prompts
from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.calibrate.trajectory import Calibration
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import shared_inputs
from fluxdeploy.build.checkpoint import hash_checkpoint
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError, ExportError, UsageError
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import read_ranges, write_ranges

DIGEST = "0123456789abcdef" * 4
ATTENTION = "transformer_blocks.0.attn"


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(checkpoint("dev"))


@pytest.fixture
def ranges(opened: Checkpoint) -> ActivationRanges:
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    shared = shared_inputs(chain)
    heads = {name: math.pi / (i + 1) for i, name in enumerate(attentions(chain))}
    return ActivationRanges(
        checkpoint=DIGEST,
        calibration=Calibration(("", 'a sign: "Ω"'), 7, ((64, 96), (16, 16)), 4, 3.5),
        inputs={name: math.e * i for i, name in enumerate(linears(chain))},
        values=heads,
        queries=heads,
        keys=heads,
        channels={
            name: base64.b64encode(bytes(weights[f"{name}.weight"].shape[1])).decode()
            for name in {shared[name] for name in linears(chain)}
        },
    )


def test_ranges_come_back_equal(
    tmp_path: Path, opened: Checkpoint, ranges: ActivationRanges
) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(ranges, path)
    assert read_ranges(path, opened, DIGEST) == ranges
    first = path.read_bytes()
    write_ranges(read_ranges(path, opened, DIGEST), path)
    assert path.read_bytes() == first


@pytest.mark.usefixtures("remembered_traces")
def test_an_export_into_a_new_folder_has_the_ranges(
    tmp_path: Path, opened: Checkpoint, ranges: ActivationRanges
) -> None:
    given, out = tmp_path / "ranges.json", tmp_path / "new/out"
    digest = hash_checkpoint(opened, Progress(quiet=True)).digest
    write_ranges(replace(ranges, checkpoint=digest), given)
    arguments = [*("--component", "transformer", "--precision", "fp8"), "--calibration", str(given)]
    command = ["export", str(opened.root), *arguments, "--out", str(out)]
    result = CliRunner().invoke(main, command, prog_name="fluxdeploy")
    assert result.exit_code == 0, result.output
    assert read_ranges(out / "calibration.json", opened, digest) == replace(
        ranges, checkpoint=digest
    )


def test_another_checkpoints_ranges_are_refused(
    tmp_path: Path, opened: Checkpoint, ranges: ActivationRanges, checkpoint: Callable[..., Path]
) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(ranges, path)
    with pytest.raises(ExportError, match="another checkpoint"):
        read_ranges(path, opened, "f" * 64)
    with pytest.raises(ExportError, match="another checkpoint"):
        read_ranges(path, open_checkpoint(checkpoint("schnell")), "f" * 64)


Change = Callable[[dict[str, Any]], Any]


def change_channels(plain: dict[str, Any], text: str) -> None:
    plain["ranges"]["channels"]["transformer_blocks.0.attn.to_q"] = text


def change_means(plain: dict[str, Any], component: str, text: str) -> None:
    plain["means"] = {component: {"transformer_blocks.0.attn.to_q": text}}


def recipe(**parts: Any) -> dict[str, Any]:
    """A recipe's record as JSON."""
    promise = {"cosine": 0.99, "psnr": None, "ssim": None}
    found = {"spared": {}, "smoothed": {}, **parts}
    return {
        "precision": "int8-weights",
        "promise": promise,
        "recipe": found,
        "before": None,
        "after": None,
        "share": 0.0,
        "extra_bytes": 0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(schema_version=3), "version 3"),
        (lambda plain: plain.pop("schema_version"), "schema_version"),
        (lambda plain: plain["ranges"].pop("keys"), "keys is missing"),
        (lambda plain: plain.update(headroom=1.0), "headroom is not a known field"),
        (lambda plain: plain["ranges"]["calibration"].update(seed="0"), "calibration.seed"),
        (lambda plain: plain["ranges"]["calibration"].update(sizes=[[64, 64, 64]]), r"sizes\[0\]"),
        (lambda plain: plain["ranges"]["inputs"].popitem(), "is missing"),
        (lambda plain: plain["ranges"]["inputs"].update(context_embedder=1.0), "context_embedder"),
        (lambda plain: plain["ranges"]["channels"].popitem(), "is missing"),
        (lambda plain: change_channels(plain, "AAAA"), "has 3 channels"),
        (lambda plain: change_channels(plain, "A"), "is not base64"),
        (lambda plain: change_means(plain, "t6", "AAAA"), r"means\.t6 is no component"),
        (lambda plain: change_means(plain, "t5", "AAAA"), r"means\.t5\[.*no input"),
        (lambda plain: change_means(plain, "transformer", "AAAAAA=="), "has 2 channels"),
        (lambda plain: change_means(plain, "transformer", "AA=A"), "is not bfloat16"),
        (lambda plain: change_means(plain, "transformer", 32 * "gH+Af4B/"), "NaN or infinity"),
        (lambda plain: plain.update(recipes={"t5": recipe(spared={"a": "all"})}), r"recipe.spared"),
        (lambda plain: plain.update(recipes={"t5": recipe(smoothed={"a": 1.0})}), r"smoothed"),
        (
            lambda plain: plain["ranges"]["values"].update({"transformer_blocks.0.attn": -1.0}),
            "0 or more",
        ),
        (
            lambda plain: plain["ranges"]["queries"].update({"transformer_blocks.0.attn": None}),
            "queries",
        ),
    ],
)
def test_changed_files_are_refused(
    tmp_path: Path, opened: Checkpoint, ranges: ActivationRanges, change: Change, message: str
) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(ranges, path)
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(ExportError, match=message):
        read_ranges(path, opened, DIGEST)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema_version": 2}',
        b"\xff\xfe",
        b'{"schema_version": 2, "keys": NaN}',
    ],
)
def test_files_that_hold_no_ranges_are_refused(
    tmp_path: Path, opened: Checkpoint, contents: bytes
) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(contents)
    with pytest.raises(ExportError, match=r"ranges\.json"):
        read_ranges(path, opened, DIGEST)


def test_disk_errors_are_told(tmp_path: Path, opened: Checkpoint, ranges: ActivationRanges) -> None:
    with pytest.raises(ExportError, match="No such file"):
        read_ranges(tmp_path / "absent.json", opened, DIGEST)
    with pytest.raises(BundleError, match="no such file or folder"):
        write_ranges(ranges, tmp_path / "absent" / "ranges.json")


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\r\n\n  über den Wolken  \n\t\na\u2028b".encode())
    assert read_prompts(path) == ("a red fox", "über den Wolken", "a\u2028b")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "Cannot read"),
        (b"", "no prompt"),
        (b" \n\r\n", "no prompt"),
        (b"a caf\xe9\n", r"not UTF-8 text \(byte 5\)"),
    ],
)
def test_files_without_prompts_are_refused(
    tmp_path: Path, contents: bytes | None, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UsageError, match=message):
        read_prompts(path)
