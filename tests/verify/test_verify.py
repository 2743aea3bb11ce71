"""`fluxdeploy verify`: passes what `build` made, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")

import onnx

from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.tensorfile import TensorFileWriter, read_header, read_tensor
from fluxdeploy.cli import main
from tests.conftest import build_bundle
from tests.exporters.quantized.test_quantized_graphs import Graph
from tests.support.shared_folder import SharedFolder

if TYPE_CHECKING:
    from tests.support.traces import Traces


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def record_again(bundle: Path, component: str, file: str) -> None:
    """Give a changed file the size and hash that it now has."""
    path, manifest = bundle / file, bundle / "fluxdeploy.json"
    document = json.loads(manifest.read_text())
    records = document["components"][component]["files"]
    (record,) = (record for record in records if record["path"] == file)
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record["size"] = path.stat().st_size
    manifest.write_text(json.dumps(document))


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
    assert report["pictures"]["max_difference"] <= 1.0
    assert report["pictures"]["ssim"]["min"] > 0.9999
    assert report["layers"] is None
    assert report["emulated"] is False


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
    record_again(bundle, "vae_decoder", "golden/vae_decoder.safetensors")
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


def test_pictures_without_a_checkpoint_are_refused(bundle: Path) -> None:
    manifest = bundle / "fluxdeploy.json"
    document = json.loads(manifest.read_text())
    document["provenance"]["checkpoint"]["name"] = "somebody's"
    manifest.write_text(json.dumps(document))
    result = run("--bundle", bundle, "--pictures", 2)
    assert result.exit_code == 2
    assert "takes --checkpoint" in result.stderr


@pytest.fixture
def fp8_bundle(shared_folder: SharedFolder, traces: Traces, tmp_path: Path) -> Path:
    """A copy of the default checkpoint's FP8 bundle, calibrated over one prompt."""

    def make(folder: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle above a blue square\n")
        build_bundle(BuildRequest(precision="fp8", calibration=prompts), folder)

    bundle = shared_folder.entry("bundle-demo-fp8", make)
    return Path(shutil.copytree(bundle, tmp_path / "fp8"))


def test_fp8_passes_on_a_cpu_as_an_emulation(fp8_bundle: Path) -> None:
    result = run("--bundle", fp8_bundle, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["emulated"] is True
    emulated = {row["name"] for row in report["components"] if row["emulated"]}
    assert emulated == {"conditioner", "transformer"}
    layers = report["layers"]
    assert next(iter(layers["sqnr"])) == "transformer_blocks.0.attn.to_q"
    assert layers["min_sqnr"] < min(layers["sqnr"].values()) == layers["sqnr"][layers["worst"]]
    assert report["pictures"]["psnr"]["median"] < 100


def scale(bundle: Path, factor: float, wanted: Callable[[Graph, onnx.NodeProto], bool]) -> None:
    """Change the scales of those QuantizeLinear nodes of the transformer that are wanted."""
    graph = Graph(bundle / "onnx" / "transformer.onnx")
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and wanted(graph, node):
            tensor = graph.initializers[node.input[1]]
            changed = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    (bundle / "onnx" / "transformer.onnx").write_bytes(graph.model.SerializeToString())
    record_again(bundle, "transformer", "onnx/transformer.onnx")


def is_value(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node narrows V in the third single-stream block."""
    parts = graph.attention(graph.softmaxes["single_transformer_blocks.2.attn"])
    return graph.quantizer(parts["values"]) == node


def test_a_scale_of_v_in_one_block_that_is_too_small_fails(fp8_bundle: Path) -> None:
    scale(fp8_bundle, 1 / 16, is_value)
    result = run("--bundle", fp8_bundle, "--json")
    assert result.exit_code == 1, result.output
    layers = json.loads(result.stdout)["layers"]
    failed = {name for name, ratio in layers["sqnr"].items() if ratio < layers["min_sqnr"]}
    assert failed == {f"single_transformer_blocks.2.attn.{part}" for part in ("value", "output")}


def test_a_scale_of_v_in_one_block_that_is_too_large_is_refused(fp8_bundle: Path) -> None:
    scale(fp8_bundle, 16, is_value)
    result = run("--bundle", fp8_bundle)
    assert result.exit_code == 1, result.output
    assert "scale of single_transformer_blocks.2.attn.value" in result.stderr


def test_scales_of_a_block_that_are_too_small_fail(fp8_bundle: Path) -> None:
    scale(fp8_bundle, 1 / 16, lambda graph, node: "transformer_blocks.1." in node.name)
    result = run("--bundle", fp8_bundle, "--json")
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert not report["layers"]["passed"]
    assert "transformer_blocks.1." in report["layers"]["worst"]
    failed = [row["name"] for row in report["components"] if not row["passed"]]
    assert failed == ["transformer"]
