"""`fluxdeploy verify`: passes what `build` made, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fluxdeploy.cli import main
from fluxdeploy.tensorfile import TensorFileWriter, read_header, read_tensor


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the default bundle that may be damaged."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def test_the_default_bundle_passes(demo_bundle: Path) -> None:
    result = run("--bundle", demo_bundle, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    assert {row["name"] for row in report["components"]} == {
        *("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder")
    }
    assert all(row["deviation"]["max_error"] < 1e-3 for row in report["components"])
    assert report["picture"]["max_difference"] <= 1.0


@pytest.mark.parametrize(
    "file", ["golden/t5.safetensors", "onnx/clip.onnx", "onnx/weights/vae.*.safetensors"]
)
def test_a_changed_byte_fails(bundle: Path, file: str) -> None:
    (path,) = bundle.glob(file)
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    result = run("--bundle", bundle)
    assert result.exit_code == 1
    assert path.name in result.stderr.splitlines()[-1]


def test_an_engine_past_its_gate_fails(bundle: Path) -> None:
    """Golden outputs of another model, with a manifest that calls them its own."""
    path = bundle / "golden" / "vae_decoder.safetensors"
    file = read_header(path)
    tensors = {name: read_tensor(file, name) for name in file.tensors}
    tensors["output.images"] = tensors["output.images"] + np.float32(0.1)
    declared = [(name, entry.dtype, entry.shape) for name, entry in file.tensors.items()]
    with TensorFileWriter(path, declared) as writer:
        for array in tensors.values():
            writer.write(array)
    manifest = bundle / "fluxdeploy.json"
    document = json.loads(manifest.read_text())
    (record,) = (
        record
        for record in document["components"]["vae_decoder"]["files"]
        if record["path"] == "golden/vae_decoder.safetensors"
    )
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record["size"] = path.stat().st_size
    manifest.write_text(json.dumps(document))
    result = run("--bundle", bundle, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["passed"]
    failed = [row["name"] for row in report["components"] if not row["passed"]]
    assert failed == ["vae_decoder"]


def test_another_checkpoint_is_refused(demo_bundle: Path, checkpoints: Callable[..., Path]) -> None:
    result = run("--bundle", demo_bundle, "--checkpoint", checkpoints(scale=0.5))
    assert result.exit_code == 2
    assert "is not the checkpoint" in result.stderr
