"""Checkpoints of tasks are assembled once, where only their user writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxdeploy.bundle.tensorfile import TensorFileWriter, from_float32, read_header, read_tensor
from fluxdeploy.demo.folders import Folders
from fluxdeploy.errors import CheckpointError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    declared = [(name, "BF16", values.shape) for name, values in tensors.items()]
    with TensorFileWriter(file, declared) as writer:
        for values in tensors.values():
            writer.write(from_float32(values.astype(np.float32), "BF16"))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, task = tmp_path / "base", tmp_path / "painter"
    write(
        base / WEIGHTS,
        {
            "a.weight": np.eye(4, 3),
            "a.bias": np.ones(4),
            "b.weight": np.ones((2, 2)),
            "x.weight": np.ones((2, 1)),
        },
    )
    write(base / "vae" / "diffusion_pytorch_model.safetensors", {"v": np.ones(2)})
    (base / "model_index.json").write_text("{}")
    write(
        task / "difference.safetensors",
        {
            "a.lora_A.weight": np.full((1, 3), 2),
            "a.lora_B.weight": np.arange(4)[:, None],
            "x.weight": np.full((2, 5), 7),
        },
    )
    (task / "model_index.json").write_text('{"_class_name": "Painter"}')
    (task / "transformer").mkdir()
    (task / "transformer" / "config.json").write_text('{"in_channels": 5}')
    return Folders({"demo:base": base}, {"demo:painter": task}, base)


def values(folder: Path, name: str) -> np.ndarray:
    file = read_header(folder / WEIGHTS)
    return (read_tensor(file, name).astype(np.uint32) << 16).view(np.float32)


def test_low_ranks_are_added_and_whole_tensors_replaced(folders: Folders) -> None:
    made = folders["demo:painter"]
    expected = np.eye(4, 3) + 2 * np.arange(4)[:, None]
    np.testing.assert_array_equal(values(made, "a.weight"), expected)
    np.testing.assert_array_equal(values(made, "a.bias"), np.ones(4))
    np.testing.assert_array_equal(values(made, "b.weight"), np.ones((2, 2)))
    np.testing.assert_array_equal(values(made, "x.weight"), np.full((2, 5), 7))
    assert set(read_header(made / WEIGHTS).tensors) == {
        "a.weight",
        "a.bias",
        "b.weight",
        "x.weight",
    }
    assert json.loads((made / "model_index.json").read_text()) == {"_class_name": "Painter"}
    assert json.loads((made / "transformer" / "config.json").read_text()) == {"in_channels": 5}
    assert not (made / "difference.safetensors").exists()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (made / vae).read_bytes() == (folders["demo:base"] / vae).read_bytes()


def test_a_task_is_assembled_once_and_anew_where_it_differs(
    folders: Folders, tmp_path: Path
) -> None:
    first = folders["demo:painter"]
    written = (first / WEIGHTS).stat()
    assert folders["demo:painter"] == first
    assert (first / WEIGHTS).stat().st_ino == written.st_ino
    (tmp_path / "painter" / "model_index.json").write_text('{"_class_name": "Other"}')
    second = folders["demo:painter"]
    assert second != first
    assert sorted(os.listdir(first.parent)) == sorted((first.name, second.name))


def test_names_are_listed_without_assembling(folders: Folders, tmp_path: Path) -> None:
    assert list(folders) == ["demo:base", "demo:painter"]
    assert len(folders) == 2
    assert "demo:painter" in folders
    assert "demo:other" not in folders
    assert folders.get("demo:other") is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions are of POSIX")
def test_a_cache_that_others_can_write_is_refused(folders: Folders, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "fluxdeploy"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(CheckpointError, match=r"demo:painter.*chmod go-w"):
        folders["demo:painter"]


def test_a_failed_assembly_leaves_nothing(folders: Folders, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "base" / "transformer")
    with pytest.raises(CheckpointError, match="transformer"):
        folders["demo:painter"]
    assert os.listdir(tmp_path / "cache" / "fluxdeploy") == []
