"""Opening a bundle: what is missing, changed or outside is named; a whole one opens."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fluxdeploy.bundle
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import BundleError


def _refusal(root: Path, check: str = "small") -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(root, check)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_whole_bundle_opens(bundle: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    counts: list[int] = []
    opened = open_bundle(str(bundle), on_bytes=counts.append)
    assert opened.manifest == manifest
    assert opened.path("onnx/t5.onnx").read_bytes() == files["onnx/t5.onnx"]
    text = (bundle / "fluxdeploy.json").read_bytes()
    assert opened.content_hash == hashlib.sha256(text).hexdigest()
    assert sum(counts) == sum(map(len, files.values()))


def test_a_relative_path_stays_valid_after_a_change_of_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = open_bundle("bundle")
    monkeypatch.chdir("/")
    assert opened.path("onnx/t5.onnx").is_file()


def test_a_moved_bundle_opens(bundle: Path) -> None:
    moved = bundle.rename(bundle.with_name("elsewhere"))
    os.symlink(moved, bundle)
    assert open_bundle(moved).content_hash == open_bundle(bundle).content_hash


def test_paths_outside_are_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for path in ("../x", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(BundleError, match="has no file"):
            opened.path(path)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        refusal = _refusal(path)
        assert f"There is no bundle at {path}" in refusal
        assert "`fluxdeploy build`" in refusal


def test_a_swap_that_was_cut_off_is_explained(bundle: Path) -> None:
    aside = bundle.rename(bundle.with_name(".bundle.previous"))
    refusal = _refusal(bundle)
    assert str(aside) in refusal
    assert "stopped while it replaced it" in refusal


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "onnx/t5.onnx").unlink()
    assert f"{bundle}/onnx/t5.onnx is missing. Build the bundle again" in _refusal(bundle)
    (bundle / "onnx/t5.onnx").mkdir()
    assert "onnx/t5.onnx is missing" in _refusal(bundle)


def test_a_file_of_another_size_is_named(bundle: Path) -> None:
    (bundle / "golden/t5.safetensors").write_bytes(b"gold")
    assert "golden/t5.safetensors has 4 bytes, and the manifest says 6" in _refusal(bundle)


def test_a_file_with_a_wrong_hash_is_named(bundle: Path) -> None:
    (bundle / "tokenizers/clip.json").write_bytes(b"[]")
    assert "tokenizers/clip.json was changed: its SHA-256" in _refusal(bundle)


def test_large_files_are_hashed_only_where_all_are_asked_for(
    bundle: Path, add_large_file: Path
) -> None:
    open_bundle(bundle)
    assert f"{add_large_file} was changed" in _refusal(bundle, "all")


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "onnx", tmp_path / "onnx")
    os.symlink(tmp_path / "onnx", bundle / "onnx")
    assert "onnx/t5.onnx is a link that leaves the bundle" in _refusal(bundle)


def test_a_link_within_the_bundle_is_allowed(bundle: Path) -> None:
    (bundle / "golden/t5.safetensors").rename(bundle / "golden/real")
    os.symlink("real", bundle / "golden/t5.safetensors")
    open_bundle(bundle, "all")


def test_a_sibling_with_the_same_beginning_is_outside(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle2")
    (bundle / "onnx/t5.onnx").unlink()
    os.symlink(tmp_path / "bundle2/onnx/t5.onnx", bundle / "onnx/t5.onnx")
    assert "leaves the bundle" in _refusal(bundle)


def test_a_manifest_that_is_no_text_is_refused(bundle: Path) -> None:
    (bundle / "fluxdeploy.json").write_bytes(b"\xff\xfe{}")
    assert "is not UTF-8 text" in _refusal(bundle)


def test_unknown_checks_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="'small' or 'all'"):
        open_bundle(bundle, "none")  # type: ignore[arg-type]


def test_the_facade_is_what_it_says() -> None:
    assert fluxdeploy.bundle.__all__ == ["Bundle", "open_bundle"]


def test_opening_needs_neither_numpy_nor_a_build() -> None:
    code = (
        "import sys, fluxdeploy.bundle; "
        "bad = {'numpy', 'torch', 'fcntl', 'ctypes'} & set(sys.modules); assert not bad, bad"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
