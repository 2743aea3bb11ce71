"""Weights beside a graph: which bytes are linked, which are converted, and where that fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

from exporters.checkpoint.tensors import attach_scales, read_stored
from exporters.components.chain import Chain, Piece, Stage
from exporters.weights.bind import WeightFolder, bind
from exporters.weights.decide import decide
from fluxdeploy.bundle.tensorfile import read_header
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError, CheckpointError, ExportError
from tests.exporters.conftest import Exports

ROOT = Path(__file__).parents[2]
TYPES = {
    "fp32": (ir.DataType.FLOAT, torch.float32),
    "bf16": (ir.DataType.BFLOAT16, torch.bfloat16),
    "fp16": (ir.DataType.FLOAT16, torch.float16),
}


def bind_one_weight(
    root: Path, file: Path, shape: tuple[int, ...], precision: str
) -> tuple[ir.Model, ir.ExternalTensor]:
    """Bind y = x + weight to a file of one tensor; the weight is an input, as a trace leaves it."""
    in_graph, in_module = TYPES[precision]
    x, weight = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(in_graph))
        for name in ("x", "layer.weight")
    )
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x, weight], node.outputs, nodes=[node], opset_imports={"": 22}, name="g")
    model = ir.Model(graph, ir_version=10)
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape, dtype=in_module, device="meta"))
    chain = Chain("part", (), (), (Stage(Piece(module, ()), (), (), "layer."),))
    placements = decide(chain, attach_scales(read_stored([file])), None)
    bind(model, 1, placements, WeightFolder(root / "weights"), f"part.{precision}", {})
    tensor = model.graph.initializers["layer.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return model, tensor


def bound(
    root: Path, stored: torch.Tensor, precision: str, name: str = "model.safetensors"
) -> tuple[ir.Model, ir.ExternalTensor]:
    """Bind a one-weight graph to a checkpoint of one tensor below `root`."""
    source = root / "source"
    source.mkdir(exist_ok=True)
    save_file({"layer.weight": stored}, source / name)
    return bind_one_weight(root, source / name, tuple(stored.shape), precision)


def odd_values(count: int) -> torch.Tensor:
    """float32 values of every scale within FP16's range, among them ties and subnormals."""
    random = np.random.RandomState(3)
    values = random.standard_normal(count) * 10.0 ** random.uniform(-8, 3, count)
    values[:6] = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65000.0, 2.0**-24]
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize(
    ("stored", "precision", "rounded"),
    [
        (torch.float32, "bf16", ml_dtypes.bfloat16),
        (torch.float32, "fp16", np.float16),
        (torch.bfloat16, "fp16", np.float16),
        (torch.float16, "bf16", ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, "bf16", ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, "fp32", np.float32),
    ],
)
def test_converted_weights_are_the_rounded_values(
    tmp_path: Path, stored: torch.dtype, precision: str, rounded: Any
) -> None:
    values = odd_values(5000)
    if stored == torch.float8_e4m3fn:
        values = values.clip(-400, 400)
    values = values.to(stored)
    model, tensor = bound(tmp_path, values, precision)
    expected = values.float().numpy().astype(rounded)
    assert tensor.numpy().tobytes() == expected.tobytes()
    assert tensor.location == f"weights/part.{precision}.safetensors"
    assert [node.op_type for node in model.graph] == ["Add"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_wider_graphs_cast_and_copy_no_byte(tmp_path: Path, stored: torch.dtype) -> None:
    model, tensor = bound(tmp_path, odd_values(50).to(stored), "fp32")
    assert [node.op_type for node in model.graph] == ["Cast", "Add"]
    assert tensor.dtype != ir.DataType.FLOAT
    linked = tmp_path / str(tensor.location)
    assert linked.samefile(tmp_path / "source/model.safetensors")
    assert list((tmp_path / "weights").iterdir()) == [linked]


def test_same_type_is_a_hard_link_with_the_stored_offset(tmp_path: Path) -> None:
    model, tensor = bound(tmp_path, odd_values(50).bfloat16(), "bf16")
    source = tmp_path / "source/model.safetensors"
    entry = read_header(source).tensors["layer.weight"]
    assert (tensor.offset, tensor.length) == (entry.offset, entry.nbytes)
    assert (tmp_path / str(tensor.location)).samefile(source)
    assert len(list(model.graph)) == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK])
def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    _, tensor = bound(tmp_path, odd_values(50).bfloat16(), "bf16")
    copied, source = tmp_path / str(tensor.location), tmp_path / "source/model.safetensors"
    assert copied.read_bytes() == source.read_bytes()
    assert not copied.samefile(source)


def test_scaled_weights_are_never_linked(tmp_path: Path) -> None:
    """A scale would be lost, whatever the stored type."""
    save_file(
        {"layer.weight": torch.ones(4), "layer.scale_weight": torch.tensor(0.25)},
        tmp_path / "model.safetensors",
    )
    _, tensor = bind_one_weight(tmp_path, tmp_path / "model.safetensors", (4,), "fp32")
    assert (tensor.numpy() == 0.25).all()


def test_values_past_fp16_name_the_precision_that_holds_them(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -1e6])
    with pytest.raises(CheckpointError, match=r"layer.weight holds values up to 1e\+06.*bf16"):
        bound(tmp_path, values, "fp16")
    assert list((tmp_path / "weights").iterdir()) == []
    bound(tmp_path, values, "bf16")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, value: float, precision: str
) -> None:
    with pytest.raises(CheckpointError, match=r"layer.weight holds NaN or infinity in .*broken"):
        bound(tmp_path, torch.tensor([1.0, value]), precision)
    assert list((tmp_path / "weights").iterdir()) == []


def test_converted_file_never_replaces_a_linked_one(tmp_path: Path) -> None:
    folder = WeightFolder(tmp_path / "weights")
    (tmp_path / "clip.fp16.safetensors").write_bytes(b"linked")
    folder.link(tmp_path / "clip.fp16.safetensors")
    with pytest.raises(ExportError, match="rename that file"):
        folder.reserve("clip.fp16.safetensors")
    other = WeightFolder(tmp_path / "weights2")
    other.reserve("clip.fp16.safetensors")
    with pytest.raises(ExportError, match="rename one of them"):
        other.link(tmp_path / "clip.fp16.safetensors")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="file, not a folder"):
        WeightFolder(tmp_path / "file/weights").make()


# Whole exports, through the command line.


def export_clip(checkpoint: Path, out: Path, precision: str) -> Result:
    arguments = ["export", str(checkpoint), "--component", "clip", "--out", str(out)]
    arguments += ["--precision", precision, "--json"]
    return CliRunner().invoke(main, arguments, prog_name="fluxdeploy")


def test_exports_are_equal_byte_for_byte(exports: Exports, source: Path, tmp_path: Path) -> None:
    """In another process, with another order of sets and dicts of strings."""
    components = ("clip", "vae_encoder")
    command = [sys.executable, "-m", "fluxdeploy", "export", str(source), "--json"]
    command += ["--precision", "bf16", "--out", str(tmp_path)]
    subprocess.run(
        [*command, *(f"--component={component}" for component in components)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "123"},
        check=True,
        capture_output=True,
        timeout=180,
    )
    expected: dict[str, bytes] = {}
    for component in components:
        expected |= files_below(exports(component, "bf16").parent)
    assert len(expected) == 4
    written = files_below(tmp_path)
    assert written.keys() == expected.keys()
    assert [name for name in written if written[name] != expected[name]] == []


def files_below(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KB, too small for CLIP's 260 KB; skipped where mounting is forbidden."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "fluxdeploy-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_disk(source: Path, small_disk: Path, precision: str, tmp_path: Path) -> None:
    """Copied (fp32) and converted (bf16) weights: a message, no litter, and a rerun that works."""
    result = export_clip(source, small_disk / "out", precision)
    assert result.exit_code == 1
    assert "free some space" in result.stderr
    assert "Traceback" not in result.output
    assert [p for p in small_disk.rglob("*") if p.is_file()] == []
    remount(small_disk, "size=8m")
    assert export_clip(source, small_disk / "out", precision).exit_code == 0
    assert export_clip(source, tmp_path / "whole", precision).exit_code == 0
    names = ("clip.onnx", f"weights/clip.{precision}.safetensors")
    for name in names:
        assert (small_disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_read_only_disk(source: Path, small_disk: Path) -> None:
    remount(small_disk, "ro")
    result = export_clip(source, small_disk / "out", "fp32")
    assert result.exit_code == 1
    assert "read-only" in result.stderr


def test_out_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = export_clip(source, tmp_path / "file/out", "fp32")
    assert result.exit_code == 1
    assert "a file, not a folder" in result.stderr


def test_export_over_an_older_one(source: Path, exports: Exports, tmp_path: Path) -> None:
    """What was there before is replaced, never written through a link into the checkpoint."""
    before = load_file(source / "text_encoder/model.safetensors")
    weights = tmp_path / "weights"
    weights.mkdir()
    os.link(source / "text_encoder/model.safetensors", weights / "clip.bf16.safetensors")
    (tmp_path / "clip.onnx").write_text("old")
    assert export_clip(source, tmp_path, "bf16").exit_code == 0
    assert (tmp_path / "clip.onnx").read_bytes() == exports("clip", "bf16").read_bytes()
    after = load_file(source / "text_encoder/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
