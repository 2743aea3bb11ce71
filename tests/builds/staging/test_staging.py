"""Staging: what may be replaced, what is reused, what is left after a failure."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fluxdeploy.build import staging
from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.files import link_or_copy
from fluxdeploy.bundle.manifest import FileRecord, Manifest
from fluxdeploy.errors import BundleError

COMPONENT = ("onnx/t5.onnx", "onnx/weights/t5.safetensors", "golden/t5.safetensors")
KEY = "t5 from somewhere"


def _write(root: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def _build(destination: Path, files: dict[str, bytes], manifest: Manifest) -> None:
    with Staging(destination) as stage:
        _write(stage.root, files)
        stage.record("t5", KEY, COMPONENT)
        stage.record("tokenizer", "k", ["tokenizers/clip.json"])
        stage.commit(manifest)


def _names(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


def test_a_build_becomes_a_bundle_and_leaves_nothing_else(
    tmp_path: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    destination = tmp_path / "some" / "where"
    with Staging(destination) as stage:
        _write(stage.root, {**files, "scratch/x/y": b"", ".hidden": b""})
        os.symlink("/etc", stage.root / "link")
        records = stage.record("t5", KEY, [stage.root / path for path in COMPONENT])
        assert [record.path for record in records] == sorted(COMPONENT)
        assert set(records) == set(manifest.components["t5"].files)
        assert not destination.exists()
        stage.commit(manifest)  # the tokenizer was not recorded: commit hashes it
    assert open_bundle(destination, "all").manifest == manifest
    assert _names(destination) == {*files, "fluxdeploy.json"}
    assert not (destination / "scratch").exists()
    assert os.listdir(destination.parent) == ["where"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_earlier_bundle_stays_until_the_new_one_is_whole(
    bundle: Path,
    files: dict[str, bytes],
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    exchange: bool,
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    newer = replace(manifest, variant="schnell")
    with Staging(bundle) as stage:
        _write(stage.root, files)
        stage.record("t5", KEY, COMPONENT)
        assert open_bundle(bundle).manifest == manifest
        stage.commit(newer)
    assert open_bundle(bundle, "all").manifest == newer
    assert os.listdir(bundle.parent) == ["bundle"]


def test_a_swap_that_fails_puts_the_earlier_bundle_back(
    bundle: Path, files: dict[str, bytes], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name == ".bundle.building":
            raise PermissionError(13, "no")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(BundleError, match=r"Cannot replace .*permission is denied"):
        _build(bundle, files, manifest)
    assert open_bundle(bundle, "all").manifest == manifest


def test_a_stopped_build_goes_on_where_it_was(
    tmp_path: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    destination = tmp_path / "bundle"
    with Staging(destination) as stage:
        assert stage.finished("t5", KEY) is None
        _write(stage.root, files)
        records = stage.record("t5", KEY, COMPONENT)
    assert not destination.exists()
    with Staging(destination) as stage:
        # What no recorded artifact names may be half written.
        assert not (stage.root / "tokenizers").exists()
        assert stage.finished("tokenizer", "k") is None
        counts: list[int] = []
        assert stage.finished("t5", KEY, counts.append) == records
        assert stage.finished("t5", KEY, counts.append) == records
        assert sum(counts) == sum(record.size for record in records)
        _write(stage.root, {"tokenizers/clip.json": files["tokenizers/clip.json"]})
        stage.record("tokenizer", "k", ["tokenizers/clip.json"])
        stage.commit(manifest)
    assert open_bundle(destination, "all").manifest == manifest


@pytest.mark.parametrize("damage", ["key", "bytes", "size", "missing", "link", "record"])
def test_a_piece_that_is_not_as_recorded_is_made_again(
    tmp_path: Path, files: dict[str, bytes], damage: str
) -> None:
    destination = tmp_path / "bundle"
    with Staging(destination) as stage:
        _write(stage.root, files)
        stage.record("t5", KEY, COMPONENT)
        stage.record("shares", "s", ["onnx/weights/t5.safetensors"])
    path = stage.root / "onnx/t5.onnx"
    if damage == "bytes":
        path.write_bytes(b"A graph")
    elif damage == "size":
        path.write_bytes(b"a graph!")
    elif damage == "missing":
        path.unlink()
    elif damage == "link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    elif damage == "record":
        (stage.root / ".artifacts/t5.json").write_text('{"key": "t5 from somewhere"}')
    with Staging(destination) as stage:
        assert stage.finished("t5", "another" if damage == "key" else KEY) is None
        # Stale files are gone, but for the one that another finished artifact has too.
        assert _names(stage.root) == {".artifacts/shares.json", "onnx/weights/t5.safetensors"}
        assert stage.finished("shares", "s") is not None


def test_components_of_the_earlier_bundle_are_linked(
    bundle: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    with Staging(bundle) as stage:
        assert stage.finished("t5", "another") is None
        assert stage.finished("clip", KEY) is None
        assert stage.finished("t5", KEY) == manifest.components["t5"].files
        for path in COMPONENT:
            assert (stage.root / path).samefile(bundle / path)
        _write(stage.root, {"tokenizers/clip.json": files["tokenizers/clip.json"]})
        stage.commit(manifest)
    assert open_bundle(bundle, "all").manifest == manifest


def test_a_damaged_earlier_bundle_is_not_reused(bundle: Path) -> None:
    (bundle / "onnx/t5.onnx").write_bytes(b"A graph")
    with Staging(bundle) as stage:
        assert stage.finished("t5", KEY) is None


def test_files_linked_to_an_earlier_bundle_are_never_written_through(
    bundle: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    with Staging(bundle) as stage:
        assert stage.finished("t5", KEY)
    with Staging(bundle) as stage:
        assert stage.finished("t5", "a new key") is None
        _write(stage.root, {"onnx/t5.onnx": b"new"})
    assert (bundle / "onnx/t5.onnx").read_bytes() == files["onnx/t5.onnx"]
    open_bundle(bundle, "all")


def test_known_hashes_are_not_computed_again(tmp_path: Path, files: dict[str, bytes]) -> None:
    with Staging(tmp_path / "bundle") as stage:
        _write(stage.root, files)
        known = {"onnx/weights/t5.safetensors": "f" * 64}
        counts: list[int] = []
        records = stage.record("t5", KEY, COMPONENT, known, counts.append)
        assert {record.path: record.sha256 for record in records}.items() >= known.items()
        assert sum(counts) == sum(r.size for r in records if r.path not in known)


def test_commit_refuses_what_is_not_there(
    bundle: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    other = FileRecord("tokenizers/clip.json", 2, "0" * 64)
    tokenizer = replace(manifest.tokenizers["clip"], files=(other,))
    with Staging(bundle) as stage:
        _write(stage.root, files)
        with pytest.raises(BundleError, match=r"clip\.json is not the file that the manifest"):
            stage.commit(replace(manifest, tokenizers={"clip": tokenizer}))
        (stage.root / "onnx/t5.onnx").write_bytes(b"short")
        with pytest.raises(BundleError, match=r"t5\.onnx has 5 bytes, and the manifest says 7"):
            stage.commit(manifest)
        (stage.root / "onnx/t5.onnx").unlink()
        with pytest.raises(BundleError, match=r"onnx/t5\.onnx was not written"):
            stage.commit(manifest)
        with pytest.raises(BundleError, match=r"rope\.theta"):
            stage.commit(replace(manifest, rope=replace(manifest.rope, theta=0.0)))
    assert open_bundle(bundle, "all").manifest == manifest


def test_record_refuses_what_is_no_file_of_the_build(tmp_path: Path) -> None:
    with Staging(tmp_path / "bundle") as stage:
        with pytest.raises(BundleError, match="x was not written"):
            stage.record("x", "k", ["x"])
        (stage.root / "x").symlink_to("/etc/passwd")
        with pytest.raises(BundleError, match="x was not written"):
            stage.record("x", "k", ["x"])
        for path in ("../x", ".artifacts/x.json", "fluxdeploy.json", tmp_path / "x"):
            with pytest.raises(ValueError, match=r"path|x"):
                stage.record("x", "k", [path])


def test_a_failed_build_without_pieces_leaves_no_trace(tmp_path: Path) -> None:
    with Staging(tmp_path / "bundle") as stage:
        (stage.root / "half").write_bytes(b"")
    assert os.listdir(tmp_path) == []


def test_two_builds_to_one_place_do_not_mix(tmp_path: Path, files: dict[str, bytes]) -> None:
    with Staging(tmp_path / "bundle") as first:
        _write(first.root, files)
        with pytest.raises(BundleError, match="Another build is running in"):
            Staging(tmp_path / "bundle").__enter__()
        first.record("t5", KEY, COMPONENT)
        with Staging(tmp_path / "other"):
            pass
    with Staging(tmp_path / "bundle") as second:
        assert second.finished("t5", KEY)


def test_somebody_s_files_are_never_replaced(bundle: Path, tmp_path: Path) -> None:
    def refusal(destination: Path) -> str:
        with pytest.raises(BundleError) as caught, Staging(destination):
            pass
        assert not destination.with_name(f".{destination.name}.building").exists()
        return str(caught.value)

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    assert "holds files and is not a bundle" in refusal(tmp_path / "photos")
    assert "is a file, not a folder" in refusal(tmp_path / "photos" / "cat.jpg")
    (bundle / "cat.png").write_bytes(b"meow")
    assert "holds files that are not the bundle's, such as cat.png" in refusal(bundle)
    assert (bundle / "cat.png").read_bytes() == b"meow"
    assert "is a mount point" in refusal(Path("/proc"))
    assert "a file is in its place" in refusal(tmp_path / "photos" / "cat.jpg" / "x")


def test_files_put_into_the_earlier_bundle_during_the_build_are_kept(
    bundle: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    with Staging(bundle) as stage:
        _write(stage.root, files)
        (bundle / "cat.png").write_bytes(b"meow")
        with pytest.raises(BundleError, match=r"such as cat\.png"):
            stage.commit(manifest)
    assert (bundle / "cat.png").read_bytes() == b"meow"


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for destination in (".", "..", tmp_path / "here"):
        with pytest.raises(BundleError, match="current folder"), Staging(destination):
            pass


def test_an_empty_folder_and_a_link_to_one_are_filled(
    tmp_path: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "bundle").symlink_to(tmp_path / "disk" / "real")
    _build(tmp_path / "bundle", files, manifest)
    assert (tmp_path / "bundle").is_symlink()
    assert open_bundle(tmp_path / "bundle", "all").manifest == manifest


def test_a_broken_earlier_bundle_can_be_replaced(
    bundle: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    (bundle / "fluxdeploy.json").write_text('{"schema_version": 99}')
    _build(bundle, files, manifest)
    assert open_bundle(bundle, "all").manifest == manifest


def test_a_bundle_that_was_set_aside_comes_back(bundle: Path, manifest: Manifest) -> None:
    bundle.rename(bundle.with_name(".bundle.previous"))
    with Staging(bundle):
        assert open_bundle(bundle, "all").manifest == manifest
    shutil.copytree(bundle, bundle.with_name(".bundle.previous"))
    with Staging(bundle):
        pass
    assert os.listdir(bundle.parent) == ["bundle"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_earlier_bundle(
    small_disk: Path, tmp_path: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    destination = small_disk / "bundle"
    _build(destination, files, manifest)
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(1 << 20))
    with Staging(destination) as stage:
        assert stage.finished("t5", KEY)
        with pytest.raises(BundleError, match=r"Cannot write .*: the disk is full; free some"):
            link_or_copy(large, stage.root / "onnx/weights/large.safetensors")
    assert open_bundle(destination, "all").manifest == manifest
    _build(destination, files, manifest)
    assert os.listdir(small_disk) == ["bundle"]


def test_a_read_only_file_system_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with (
        pytest.raises(BundleError, match=r"Cannot make the folder .*read-only"),
        Staging(small_disk / "bundle"),
    ):
        pass


def test_a_mount_point_is_not_replaced(small_disk: Path) -> None:
    with pytest.raises(BundleError, match="name a folder inside it"), Staging(small_disk):
        pass


def _plant_staging(destination: Path) -> Path:
    with Staging(destination) as stage:
        _write(stage.root, {"tokenizers/clip.json": b"{}"})
        stage.record("tokenizer", "k", ["tokenizers/clip.json"])
    return stage.root


def _plant_previous(destination: Path) -> Path:
    return shutil.copytree(destination, destination.with_name(".bundle.previous"))


PLANTED: dict[str, Callable[[Path], Path]] = {
    "staging": _plant_staging,
    "previous": _plant_previous,
    "destination": lambda destination: destination,
}


def _refused(destination: Path, planted: Path) -> str:
    before = _names(destination.parent)
    with pytest.raises(BundleError) as caught, Staging(destination):
        pass
    assert str(planted) in str(caught.value)
    assert "choose another folder" in str(caught.value)
    assert _names(destination.parent) == before
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o777, 0o773, 0o757, 0o1777, 0o2773])
@pytest.mark.parametrize("place", PLANTED)
def test_folders_that_others_can_write_are_refused(bundle: Path, place: str, mode: int) -> None:
    planted = PLANTED[place](bundle)
    planted.chmod(mode)
    told = _refused(bundle, planted)
    assert f"can be written by others (its mode is {mode:o})" in told
    assert f"`chmod go-w {planted}`" in told
    planted.chmod(mode & ~0o022)
    with Staging(bundle):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
@pytest.mark.parametrize("mode", [0o755, 0o700, 0o777])
@pytest.mark.parametrize("place", PLANTED)
def test_folders_of_other_users_are_refused(bundle: Path, place: str, mode: int) -> None:
    planted = PLANTED[place](bundle)
    os.chown(planted, 12345, 12345)
    planted.chmod(mode)
    told = _refused(bundle, planted)
    assert "belongs to another user (number 12345)" in told
    assert "Build as that user" in told


@pytest.mark.parametrize("place", ["building", "previous"])
@pytest.mark.parametrize("leads", ["to a bundle", "to a folder", "nowhere", "to itself"])
def test_links_in_place_of_folders_are_refused(bundle: Path, place: str, leads: str) -> None:
    planted = bundle.with_name(f".bundle.{place}")
    (bundle.parent / "photos").mkdir()
    (bundle.parent / "photos/cat.jpg").write_bytes(b"meow")
    targets = {"to a bundle": bundle, "to a folder": bundle.parent / "photos", "to itself": planted}
    planted.symlink_to(targets.get(leads, bundle.parent / "none"))
    assert "is a symbolic link" in _refused(bundle, planted)
    bundle.rename(bundle.with_name("moved"))
    assert "is a symbolic link" in _refused(bundle, planted)


@pytest.mark.parametrize("place", ["building", "previous"])
def test_files_in_place_of_folders_are_refused(bundle: Path, place: str) -> None:
    planted = bundle.with_name(f".bundle.{place}")
    planted.write_bytes(b"somebody's")
    with pytest.raises(BundleError, match="is a file, not a folder"), Staging(bundle):
        pass
    assert planted.read_bytes() == b"somebody's"


def test_builds_in_folders_for_all_and_with_any_mask(
    tmp_path: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    """As in /tmp, and where a group shares its files."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    earlier = os.umask(0o002)
    try:
        for _ in range(2):
            _plant_staging(tmp_path / "tmp/bundle")
            _build(tmp_path / "tmp/bundle", files, manifest)
    finally:
        os.umask(earlier)
    assert open_bundle(tmp_path / "tmp/bundle", "all").manifest == manifest
    assert (tmp_path / "tmp/bundle").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("path", ["onnx/t5.onnx", "golden/t5.safetensors", "tokenizers/clip.json"])
@pytest.mark.parametrize("how", ["bytes", "link", "recorded"])
def test_a_bundle_that_cannot_be_opened_never_replaces_another(
    bundle: Path, files: dict[str, bytes], manifest: Manifest, path: str, how: str
) -> None:
    """Also where the hash came from elsewhere, or the file changed after it was hashed."""
    content = open_bundle(bundle).content_hash
    with Staging(bundle) as stage:
        _write(stage.root, files)
        broken = stage.root / path
        if how == "recorded":
            known = {path: hashlib.sha256(files[path]).hexdigest()}
            broken.write_bytes(files[path][::-1])
            stage.record("t5", KEY, files, known)
        else:
            stage.record("t5", KEY, files)
            broken.unlink()
            broken.write_bytes(files[path][::-1])
            if how == "link":
                broken.rename(bundle.parent / "elsewhere")
                broken.symlink_to(bundle.parent / "elsewhere")
        with pytest.raises(BundleError, match=path):
            stage.commit(replace(manifest, variant="newer"))
    assert open_bundle(bundle, "all").content_hash == content
    with Staging(bundle) as stage:
        assert stage.finished("t5", "another") is None
        _write(stage.root, files)
        stage.record("t5", KEY, files)
        stage.commit(replace(manifest, variant="newer"))
    assert open_bundle(bundle, "all").manifest.variant == "newer"
