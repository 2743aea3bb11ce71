"""A bundle with an IP-Adapter, built: its graphs, its manifest, and what the command line draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError
from fluxdeploy.host.examples import example_seen
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, photograph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

ONE, TWO = photograph(48, 32, 1), photograph(50, 67, 2)
CALL: dict[str, Any] = {
    "prompt": [FOX, ROBOT],
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
    "height": 48,
    "width": 32,
    "negative_prompt": ["blurred", ""],
    "true_cfg_scale": 2.0,
    "ip_adapter_image": [[ONE, TWO]],
}


@pytest.fixture(scope="module")
def pipe(ip_adapter_bundle: Path) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(ip_adapter_bundle) as pipe:
        yield pipe


def draw(pipe: FluxPipeline, call: dict[str, Any]) -> np.ndarray:
    return np.asarray(pipe(**call, seed=5, output_type="np").images)


def test_pictures_equal_diffusers(
    pipe: FluxPipeline, ip_adapter_bundle: Path, open_reference_adapted: Callable[[str], Any]
) -> None:
    reference = open_reference_adapted("dev")
    reference.set_ip_adapter_scale(0.8)
    generator = torch.Generator("cpu").manual_seed(5)
    expected = reference(**CALL, generator=generator, output_type="np").images
    found = draw(pipe, {**CALL, "ip_adapter_scale": 0.8})
    assert np.abs(found - expected).max() < TOLERANCE
    # Each engine is open only while it is needed.
    with FluxPipeline.from_bundle(ip_adapter_bundle, low_vram=True) as other:
        np.testing.assert_array_equal(draw(other, {**CALL, "ip_adapter_scale": 0.8}), found)


def test_without_a_picture_it_is_the_plain_model_s_to_the_bit(
    pipe: FluxPipeline, open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    plain = {name: value for name, value in CALL.items() if not name.startswith("ip_adapter")}
    pictures = draw(pipe, plain)
    np.testing.assert_array_equal(pictures, draw(open_pipeline("dev"), plain))
    assert np.abs(pictures - draw(pipe, CALL)).max() > TENTH


def test_the_attentions_of_the_network_are_fused_as_ever(ip_adapter_bundle: Path) -> None:
    import onnx

    model = onnx.load(ip_adapter_bundle / "onnx" / "transformer.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MultiHeadAttention") == 4
    assert "Softmax" not in kinds


def test_warming_up_shows_a_picture(pipe: FluxPipeline) -> None:
    given = example_seen(pipe.bundle.manifest)
    assert given["ip_adapter_image"].shape == (31, 31, 3)
    pipe(FOX, height=32, width=48, num_inference_steps=1, max_sequence_length=16, **given)


def test_the_manifest_tells_how_pictures_are_read(ip_adapter_bundle: Path) -> None:
    manifest = open_bundle(ip_adapter_bundle).manifest
    assert manifest.ip_adapter is not None
    assert manifest.ip_adapter.pixels.size == (31, 31)
    recorded: Any = manifest.provenance["ip_adapter"]
    assert recorded["name"] == "ip_adapter.safetensors"
    assert {len(each) for each in recorded["sha256"] + recorded["image_encoder"]} == {64}
    assert from_json(to_json(manifest), "again") == manifest


def set_in(plain: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for step in way:
        plain = plain[int(step) if step.isdigit() else step]
    if value is None:
        del plain[last]
    else:
        plain[int(last) if last.isdigit() else last] = value


BROKEN: list[tuple[str, Any, str]] = [
    ("ip_adapter", None, "must be there where the transformer takes ip_keys"),
    ("ip_adapter.pixels.crop", [30, 31], "for the rows of what is seen"),
    ("ip_adapter.pixels.std", [0.0, 1.0, 1.0], "std"),
    ("components.ip_adapter", None, "needs the component ip_adapter"),
    ("components.ip_adapter_encoder", None, "needs the component ip_adapter_encoder"),
    ("components.ip_adapter.outputs.0.shape.0", 3, "for the blocks that see"),
    ("components.ip_adapter.outputs.1.shape.2", 5, "for the tokens of a picture that is seen"),
    ("components.ip_adapter.inputs.0.shape.1", 27, "for the picture's embedding"),
    (
        "components.transformer.inputs.6.name",
        "ip_queries",
        "the transformer takes ip_values, and only",
    ),
    ("components.transformer.inputs.6.shape.3", 8, "for the transformer's width"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN)
def test_a_manifest_that_contradicts_itself_is_refused(
    path: str, value: Any, said: str, ip_adapter_bundle: Path
) -> None:
    plain = json.loads((ip_adapter_bundle / "fluxdeploy.json").read_text())
    set_in(plain, path, value)
    with pytest.raises(BundleError, match=said):
        from_json(json.dumps(plain), "it")


def test_generate_takes_its_options_and_writes_them_down(
    ip_adapter_bundle: Path, tmp_path: Path
) -> None:
    for number, picture in enumerate((ONE, TWO)):
        picture.save(tmp_path / f"seen{number}.png")
    common = (
        f"--bundle {ip_adapter_bundle} --width 32 --height 48 --steps 2 --seed 3 --json".split()
    )
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    options = (
        f"--ip-adapter-image {tmp_path}/seen0.png --negative-ip-adapter-image {tmp_path}/seen1.png "
        "--negative-prompt blurred --true-cfg-scale 2 --ip-adapter-scale 0.7 --ip-adapter-scale 1"
    ).split()
    result = CliRunner().invoke(main, ["generate", FOX, *options, *common, "--out", str(out)])
    assert result.exit_code == 0, result.output
    metadata = read_metadata(out)
    assert metadata.ip_adapter_scale == "0.7,1.0"
    assert metadata.ip_adapter_sha256 != metadata.negative_ip_adapter_sha256
    line = {
        "prompt": FOX,
        "negative_prompt": "blurred",
        "true_cfg_scale": 2,
        "ip_adapter_image": "seen0.png",
        "negative_ip_adapter_image": "seen1.png",
        "ip_adapter_scale": "0.7,1",
        "out": "b.png",
    }
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    lines = ["--prompts", str(tmp_path / "lines.jsonl"), "--out", str(again)]
    result = CliRunner().invoke(main, ["generate", *lines, *common])
    assert result.exit_code == 0, result.output
    made = list(tmp_path.glob("b*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(made[0])), np.asarray(Image.open(out)))


def test_inspect_and_verify_know_it(ip_adapter_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(ip_adapter_bundle)])
    assert "4 tokens of a picture for 2 blocks" in result.output
    result = CliRunner().invoke(main, ["verify", "--bundle", str(ip_adapter_bundle), "--json"])
    assert result.exit_code == 0, result.output
    found = {each["name"] for each in json.loads(result.output)["components"]}
    assert {"ip_adapter", "ip_adapter_encoder", "transformer"} <= found
