"""A bundle with a ControlNet, built: its graphs, its manifest, and what the command line draws."""

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
from fluxdeploy.host.examples import example_control
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, photograph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

CALL: dict[str, Any] = {
    "prompt": [FOX, ROBOT],
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
    "height": 48,
    "width": 32,
    "num_images_per_prompt": 2,
    "negative_prompt": ["blurred", ""],
    "true_cfg_scale": 2.0,
    "control_image": photograph(48, 32),
    "control_mode": 3,
    "controlnet_conditioning_scale": 0.8,
    "control_guidance_end": 0.6,
}


@pytest.fixture(scope="module")
def pipe(union: Path) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(union) as pipe:
        yield pipe


def draw(pipe: FluxPipeline, call: dict[str, Any]) -> np.ndarray:
    return np.asarray(pipe(**call, seed=5, output_type="np").images)


def test_pictures_equal_diffusers(
    pipe: FluxPipeline, union: Path, open_reference_controlled: Callable[[str], Any]
) -> None:
    generator = torch.Generator("cpu").manual_seed(5)
    expected = open_reference_controlled("Union")(
        **CALL, generator=generator, output_type="np"
    ).images
    found = draw(pipe, CALL)
    assert np.abs(found - expected).max() < TOLERANCE
    # Each engine is open only while it is needed, and every picture is a part of its own.
    with FluxPipeline.from_bundle(union, low_vram=True) as other:
        np.testing.assert_array_equal(draw(other, CALL), found)


def test_without_control_a_picture_is_the_plain_model_s_to_the_bit(
    pipe: FluxPipeline, open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    plain = {name: value for name, value in CALL.items() if not name.startswith("control")}
    pictures = draw(pipe, plain)
    np.testing.assert_array_equal(pictures, draw(open_pipeline("dev"), plain))
    assert np.abs(pictures - draw(pipe, CALL)).max() > TENTH


def test_image_to_image_goes_on(
    pipe: FluxPipeline, open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    sizes = {"height": 48, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16}
    call = {"prompt": FOX, "image": photograph(48, 32), **sizes}
    np.testing.assert_array_equal(draw(pipe, call), draw(open_pipeline("dev"), call))


def test_warming_up_runs_the_controlnet(pipe: FluxPipeline) -> None:
    given = example_control(pipe.bundle.manifest, 32, 48)
    assert len(given["control_image"]) == 1
    assert given["control_mode"] == 0
    pipe(FOX, height=32, width=48, num_inference_steps=1, max_sequence_length=16, **given)


def test_the_manifest_names_the_controlnet(union: Path) -> None:
    manifest = open_bundle(union).manifest
    assert manifest.tasks == ("text to image", "image to image", "inpainting", "controlnet")
    assert [(each.component, each.modes) for each in manifest.controlnets] == [("controlnet", 5)]
    (recorded,) = manifest.provenance["controlnets"]  # type: ignore[misc,attr-defined]
    assert len(recorded["sha256"][0]) == 64
    assert from_json(to_json(manifest), "again") == manifest


def set_in(plain: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for step in way:
        plain = plain[int(step) if step.isdigit() else step]
    if value is None:
        del plain[last]
    else:
        plain[int(last) if last.isdigit() else last] = value


TWO = [{"component": "controlnet", "modes": 5}] * 2
BROKEN: list[tuple[str, Any, str]] = [
    ("controlnets", [], "must name one or more where tasks has controlnet"),
    ("tasks", ["text to image"], "must name one or more where tasks has controlnet"),
    ("controlnets.0.component", "transformer", "must be controlnet, or controlnet_2"),
    ("controlnets.0.component", "controlnet_2", "needs the component controlnet_2"),
    ("controlnets.0.modes", 0, "and controlnet_conditioner takes"),
    ("controlnets.0.modes", 5000, "is 5000"),
    ("controlnets", TWO, "has the component of an earlier one"),
    ("components.controlnet_conditioner", None, "needs the component controlnet_conditioner"),
    ("components.transformer.inputs.5.shape.0", 7, "has 7 residuals, and controlnet gives 1"),
    ("components.transformer.inputs.5.shape.3", 8, "for the transformer's width"),
    ("components.controlnet.inputs.1.name", "hint", "must be hidden_states, control_latents"),
    ("components.controlnet.inputs.0.shape.2", 384, "for a token's channels"),
    ("components.controlnet_conditioner.inputs.4.dtype", "float32", "must be int32"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN)
def test_a_manifest_that_contradicts_itself_is_refused(
    path: str, value: Any, said: str, union: Path
) -> None:
    plain = json.loads((union / "fluxdeploy.json").read_text())
    set_in(plain, path, value)
    with pytest.raises(BundleError, match=said):
        from_json(json.dumps(plain), "it")


def test_generate_takes_its_options_and_writes_them_down(union: Path, tmp_path: Path) -> None:
    Image.fromarray(np.asarray(photograph(48, 32))).save(tmp_path / "edges.png")
    common = f"--bundle {union} --width 32 --height 48 --steps 2 --seed 3 --json".split()
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    options = (
        f"--control-image {tmp_path}/edges.png --control-mode 2 --controlnet-scale 0.7 "
        "--control-start 0.5 --control-end 1"
    ).split()
    result = CliRunner().invoke(main, ["generate", FOX, *options, *common, "--out", str(out)])
    assert result.exit_code == 0, result.output
    metadata = read_metadata(out)
    assert metadata.control_mode == "2"
    assert metadata.controlnet_conditioning_scale == "0.7"
    assert metadata.control_guidance_start == "0.5"
    assert metadata.control_guidance_end == "1.0"
    assert metadata.control_sha256 is not None
    line = {
        "prompt": FOX,
        "control_image": "edges.png",
        "control_mode": 2,
        "controlnet_scale": 0.7,
        "control_start": "0.5",
        "control_guidance_end": [1],
        "out": "b.png",
    }
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    lines = ["--prompts", str(tmp_path / "lines.jsonl"), "--out", str(again)]
    result = CliRunner().invoke(main, ["generate", *lines, *common])
    assert result.exit_code == 0, result.output
    made = list(tmp_path.glob("b*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(made[0])), np.asarray(Image.open(out)))


def test_inspect_and_verify_know_it(union: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(union)])
    assert "5 kinds of control" in result.output
    result = CliRunner().invoke(main, ["verify", "--bundle", str(union), "--json"])
    assert result.exit_code == 0, result.output
    found = {each["name"] for each in json.loads(result.output)["components"]}
    assert {"controlnet", "controlnet_conditioner", "transformer"} <= found
