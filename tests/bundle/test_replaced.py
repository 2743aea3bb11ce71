"""A bundle is one thing: what is read after it was opened is of it, or refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import fluxdeploy.bundle
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.files import hash_files
from fluxdeploy.bundle.manifest import FileRecord, Manifest
from fluxdeploy.bundle.manifest_json import to_json
from fluxdeploy.errors import BundleError

GRAPH = "onnx/t5.onnx"
WORDS = r"was replaced or changed since it was opened.*open it again\.$"


def _record(bundle: Bundle, path: str = GRAPH) -> FileRecord:
    return next(record for _, record in bundle.manifest.files() if record.path == path)


def _rewrite(path: Path, data: bytes) -> None:
    """Write a file in place, and give it its time stamps back."""
    status = os.stat(path)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace_file(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    os.replace(path.with_name("new"), path)


def _replace_by_newer(root: Path) -> None:
    """As a build does: another bundle takes the name, and the earlier one is removed."""
    newer = shutil.copytree(root, root.with_name("newer"))
    manifest = newer / "fluxdeploy.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"dev"', '"schnell"'), "utf-8")
    shutil.rmtree(root)
    newer.rename(root)


CHANGES: dict[str, Callable[[Path], object]] = {
    "another bundle": _replace_by_newer,
    "no bundle": shutil.rmtree,
    "another manifest": lambda root: _rewrite(
        root / "fluxdeploy.json", (root / "fluxdeploy.json").read_bytes() + b" "
    ),
    "a manifest that is a pipe": lambda root: (
        (root / "fluxdeploy.json").unlink(),
        os.mkfifo(root / "fluxdeploy.json"),
    ),
    "another file": lambda root: _replace_file(root / GRAPH, b"A graph"),
    "a changed file": lambda root: (root / GRAPH).write_bytes(b"A graph"),
    "a changed file with its old time": lambda root: _rewrite(root / GRAPH, b"A graph"),
    "a longer file": lambda root: (root / GRAPH).write_bytes(b"a graph, longer"),
    "no file": lambda root: (root / GRAPH).unlink(),
    "a link to another file": lambda root: (
        (root / GRAPH).unlink(),
        (root / GRAPH).symlink_to(root / "tokenizers/clip.json"),
    ),
    "a pipe": lambda root: ((root / GRAPH).unlink(), os.mkfifo(root / GRAPH)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_refused(bundle: Path, change: str) -> None:
    opened = open_bundle(bundle)
    record = _record(opened)
    assert opened.read(record) == b"a graph"
    CHANGES[change](bundle)
    with pytest.raises(BundleError, match=WORDS):
        opened.read(record)
    with pytest.raises(BundleError, match=WORDS), opened.unchanged([record]):
        raise AssertionError


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("broken", [True, False])
def test_what_changes_while_it_is_read_is_refused(bundle: Path, change: str, broken: bool) -> None:
    opened = open_bundle(bundle)

    def read() -> None:
        CHANGES[change](bundle)
        if broken:
            raise RuntimeError("the runtime says something else about it")

    with pytest.raises(BundleError, match=WORDS), opened.unchanged([_record(opened)]):
        read()


def test_errors_of_an_unchanged_bundle_stay_as_they_are(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(ZeroDivisionError), opened.unchanged([_record(opened)]):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "change",
    [
        lambda root: os.link(root / GRAPH, root.with_name("linked by another build")),
        lambda root: os.chmod(root / GRAPH, 0o400),
        lambda root: os.utime(root / GRAPH),
        lambda root: _replace_file(root / GRAPH, b"a graph"),
        lambda root: (root / "onnx/vocab.json").write_text("{}"),
        lambda root: (root / "golden/t5.safetensors").unlink(),
    ],
)
def test_the_same_bytes_are_the_same_bundle(bundle: Path, change: Callable[[Path], object]) -> None:
    opened = open_bundle(bundle)
    change(bundle)
    assert opened.read(_record(opened)) == b"a graph"


def test_a_link_to_the_bundle_is_followed_once(bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    _replace_by_newer(other)
    (tmp_path / "current").symlink_to(bundle)
    opened = open_bundle(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(other)
    assert opened.read(_record(opened)) == b"a graph"
    assert open_bundle(tmp_path / "current").content_hash != opened.content_hash


@pytest.mark.parametrize("time", ["kept", "new", "another file"])
def test_large_files_are_known_by_their_stamps(
    bundle: Path, add_large_file: Path, time: str
) -> None:
    opened = open_bundle(bundle)
    large = _record(opened, add_large_file.relative_to(bundle).as_posix())
    os.link(add_large_file, bundle.with_name("linked by another build"))
    with opened.unchanged([large]):
        pass
    if time == "another file":
        with open(add_large_file.with_name("new"), "wb") as file:
            file.truncate(large.size)
        os.replace(add_large_file.with_name("new"), add_large_file)
    elif time == "new":
        os.utime(add_large_file)
    else:
        return
    with pytest.raises(BundleError, match=WORDS), opened.unchanged([large]):
        pass


def test_files_that_are_read_whole_are_small(bundle: Path, add_large_file: Path) -> None:
    opened = open_bundle(bundle)
    large = _record(opened, add_large_file.relative_to(bundle).as_posix())
    with pytest.raises(BundleError, match=r"a file of its kind has at most 67108864"):
        opened.read(large)


@pytest.mark.parametrize("times", [1, 2, 9])
def test_a_bundle_that_is_replaced_while_it_is_opened(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    left = iter(range(times))

    def replacing(*arguments: object) -> object:
        if next(left, None) is not None:
            text = to_json(replace(manifest, variant=os.urandom(4).hex()))
            (bundle / "fluxdeploy.json").write_text(text, "utf-8")
        return hash_files(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fluxdeploy.bundle, "hash_files", replacing)
    if times > 2:
        with pytest.raises(BundleError, match="is replaced again and again"):
            open_bundle(bundle)
    else:
        assert open_bundle(bundle).manifest.variant != "dev"


HUB = "models--somebody--flux/snapshots/0123abcd"


@pytest.mark.parametrize(
    "linked",
    [
        ("fluxdeploy.json",),
        ("onnx/weights/t5.safetensors",),
        ("tokenizers/clip.json", "fluxdeploy.json"),
        ("onnx",),
        ("onnx/t5.onnx", "onnx/weights/t5.safetensors", "golden", "tokenizers", "fluxdeploy.json"),
    ],
)
def test_a_hub_s_cache_is_refused_with_the_way_out(
    bundle: Path, tmp_path: Path, linked: tuple[str, ...]
) -> None:
    snapshot = tmp_path / HUB
    snapshot.parent.mkdir(parents=True)
    bundle.rename(snapshot)
    blobs = tmp_path / "models--somebody--flux/blobs"
    blobs.mkdir()
    for index, path in enumerate(linked):
        (snapshot / path).rename(blobs / f"{index:064x}")
        depth = "../" * (path.count("/") + 2)
        (snapshot / path).symlink_to(f"{depth}blobs/{index:064x}")
    with pytest.raises(
        BundleError, match=r"is a link that leaves the bundle, to .*/blobs/"
    ) as told:
        open_bundle(snapshot)
    assert f"`cp -rL {snapshot} NEW_FOLDER`" in str(told.value)
    assert "`hf download --local-dir NEW_FOLDER`" in str(told.value)
    open_bundle(shutil.copytree(snapshot, tmp_path / "copy"), "all")


def test_a_folder_of_others_is_not_recommended(bundle: Path) -> None:
    aside = bundle.rename(bundle.with_name(".bundle.previous"))
    aside.chmod(0o777)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert "rename" not in str(caught.value)
