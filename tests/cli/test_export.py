"""`fluxdeploy export`: other tools open what it writes, and it takes no more than they need."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")
pytest.importorskip("onnx")

import onnx

from exporters.checkpoint import open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import ExportSpec, specify
from exporters.weights.decide import Storing
from fluxdeploy.build.plan import exporting
from fluxdeploy.build.plan.exporting import place_weights
from fluxdeploy.bundle import files
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.cli import main
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import BundleError
from tests.support.shared_folder import SharedFolder

DEMO = DEMO_CHECKPOINTS["demo:dev"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], prog_name="fluxdeploy")


@pytest.fixture(scope="module")
def exported(shared_folder: SharedFolder, remembered_traces: Path) -> Path:
    """All components of the demo model, in float32."""

    def make(folder: Path) -> None:
        result = run("--precision", "fp32", "--out", folder)
        assert result.exit_code == 0, result.output

    return shared_folder.entry("exported-demo", make)


@pytest.mark.parametrize("component", COMPONENTS)
def test_other_tools_open_it(exported: Path, component: str) -> None:
    path = exported / f"{component}.onnx"
    model = onnx.load(path)
    assert all(tensor.HasField("raw_data") for tensor in model.graph.initializer)
    onnx.checker.check_model(str(path), full_check=True)
    loaders = pytest.importorskip("polygraphy.backend.onnx")
    assert len(loaders.OnnxFromPath(str(path))().graph.node) == len(model.graph.node)


def test_no_file_has_a_second_name(exported: Path) -> None:
    for path in exported.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1


def test_a_component_alone_takes_its_own_tensors(exported: Path) -> None:
    names = {path.name for path in (exported / "weights").iterdir()}
    assert names == {f"{component}.fp32.safetensors" for component in COMPONENTS}
    whole = (DEMO / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    decoder = exported / "weights/vae_decoder.fp32.safetensors"
    assert decoder.stat().st_size < 0.75 * whole
    stored = {entry.dtype for entry in read_header(decoder).tensors.values()}
    assert stored == {"BF16"}, "copied as they are; the graph widens them"


def specs(*components: str, precision: str = "fp32") -> list[ExportSpec]:
    checkpoint = open_checkpoint(DEMO)
    return [specify(checkpoint, COMPONENTS[name], precision) for name in components]


def share(source: int, target: int) -> None:
    """What a file system with clones does, as far as anybody sees."""
    os.write(target, os.pread(source, 1 << 24, 0))


@pytest.mark.parametrize(
    ("clones", "link", "kept"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_files_are_cloned_or_linked_and_else_their_tensors_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool, link: bool, kept: bool
) -> None:
    if clones:
        monkeypatch.setattr(files, "_share_blocks", share)
    source = shutil.copytree(DEMO, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(source)
    given = [specify(checkpoint, COMPONENTS["vae_decoder"], "fp32")]
    folder, placed = place_weights(given, tmp_path / "onnx", link)
    assert os.listdir(folder.root) == [], "what was tried is gone"
    how = {placement.how for placement in placed[0].placements}
    assert how == {Storing.LINKED if kept else Storing.COPIED}
    file = placed[0].placements[0].stored.file
    put = folder.root / folder.link(file)
    assert put.read_bytes() == file.read_bytes()
    assert (put.stat().st_nlink > 1) == link or not kept


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8-weights", "int8"])
def test_too_small_a_disk_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: free)
    result = run("--precision", precision, "--component", "transformer", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "The export writes" in result.stderr
    assert "fewer with --component" in result.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("name", "said"), [("a.json", "schema_version"), ("a.txt", "no prompt")])
def test_a_calibration_that_cannot_be_read_is_told_before_a_folder_is_made(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / name).write_text("{}" if name.endswith("json") else "\n")
    options = ("--precision", "fp8", "--component", "transformer")
    result = run(*options, "--calibration", tmp_path / name, "--out", tmp_path / "x")
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("clones", [True, False])
def test_what_takes_no_room_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clones: bool
) -> None:
    if clones:
        monkeypatch.setattr(files, "_share_blocks", share)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    place_weights(specs("clip"), tmp_path, link=not clones)
    with pytest.raises(BundleError, match="The export writes"):
        place_weights(specs("clip", precision="fp16"), tmp_path, link=not clones)


@pytest.mark.parametrize(
    ("mode", "mask", "wanted"),
    [
        (0o600, 0o022, 0o644),
        (0o640, 0o022, 0o644),
        (0o400, 0o002, 0o444),
        (0o600, 0o077, 0o600),
        (0o640, 0o027, 0o640),
        (0o644, 0o022, 0o644),
        (0o755, 0o022, 0o755),
    ],
)
def test_a_link_is_as_readable_as_the_rest(
    tmp_path: Path, mode: int, mask: int, wanted: int
) -> None:
    """Libraries save weights as private files, and a server of another user is to read them."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"weights")
    source.chmod(mode)
    before = os.umask(mask)
    try:
        assert files.can_link(source, tmp_path)
        assert files.link_or_copy(source, target) == "linked"
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == wanted
    assert target.samefile(source)


def test_a_file_whose_mode_cannot_be_changed_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"weights")
    source.chmod(0o600)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "chmod", refuse)
    assert files.link_or_copy(source, target) == "copied"
    assert source.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_mode & 0o444 == 0o444
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("put", [files.link_or_copy, files.clone])
def test_a_copy_shares_blocks_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[..., Any]
) -> None:
    asked: list[int] = []

    def shared(source: int, target: int) -> None:
        asked.append(source)
        share(source, target)

    def refuse(*_: object) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(files, "_share_blocks", shared)
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"12345")
    counts: list[int] = []
    put(tmp_path / "a", tmp_path / "new/b", counts.append)
    assert (tmp_path / "new/b").read_bytes() == b"12345"
    assert (len(asked), counts) == (1, [5])


def test_json_is_all_that_is_printed(exported: Path, remembered_traces: Path) -> None:
    result = run("--precision", "fp32", "--out", exported, "--component", "clip", "--json")
    assert result.stderr == ""
    (entry,) = json.loads(result.stdout).values()
    assert all(Path(path).is_file() for path in (entry["path"], *entry["weights"]))
