"""What `fluxdeploy triton` writes, and what the model reads of a request; no server is needed."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import EngineRecord, Manifest
from fluxdeploy.bundle.manifest_json import from_json
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.serve.triton import repository as repository_module
from fluxdeploy.serve.triton.backend import _tensors
from fluxdeploy.serve.triton.config import (
    FORMS,
    Form,
    Settings,
    component_config,
    triton_edition,
    triton_engines,
)
from fluxdeploy.serve.triton.fields import INPUTS, OUTPUTS
from fluxdeploy.serve.triton.pbtxt import Enum, render
from fluxdeploy.serve.triton.repository import write_repository
from fluxdeploy.serve.triton.requests import read_request
from tests.docs.pages import ROOT, section, tables
from tests.support.editions import with_editions
from tests.support.small_bundle import small_files, small_manifest


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return open_bundle(demo_bundle)


def parsed(text: str) -> Any:
    """A configuration as Triton reads it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, pb2.ModelConfig())


@pytest.mark.parametrize("form", FORMS)
def test_every_configuration_is_whole_and_one_that_triton_reads(
    bundle: Bundle, tmp_path: Path, form: Form
) -> None:
    models = write_repository(bundle, tmp_path / "models", form, Settings(threads=2))
    folders = sorted(path.name for path in (tmp_path / "models").iterdir() if path.is_dir())
    assert folders == sorted(models)
    for model in models:
        config = parsed((tmp_path / "models" / model / "config.pbtxt").read_text())
        assert (config.name, config.max_batch_size) == (model, 0)
        assert [group.count for group in config.instance_group] == [1]
        if model == "flux":
            assert config.model_transaction_policy.decoupled
            assert [each.name for each in config.input] == [field.name for field in INPUTS]
            assert [each.name for each in config.input if not each.optional] == ["prompt"]
            assert [each.name for each in config.output] == [field.name for field in OUTPUTS]
            given = {name: each.string_value for name, each in config.parameters.items()}
            assert from_json(given["manifest"], "it") == bundle.manifest
            assert given["bundle_hash"] == bundle.content_hash
            assert Settings.read(given).threads == (2 if form == "pipeline" else None)
            continue
        record = bundle.manifest.components[model.removeprefix("flux_")]
        assert config.platform == "onnxruntime_onnx"
        for tensors, specs in ((config.input, record.inputs), (config.output, record.outputs)):
            assert [(each.name, len(each.dims)) for each in tensors] == [
                (spec.name, len(spec.shape)) for spec in specs
            ]
        (warmup,) = config.model_warmup
        assert set(warmup.inputs) == {spec.name for spec in record.inputs}
        assert all(-1 not in each.dims for each in warmup.inputs.values())


def test_plans_are_chosen_by_compute_capability(bundle: Bundle) -> None:
    record = bundle.manifest.components["vae_decoder"]
    (graph,) = record.engines
    plans = tuple(
        EngineRecord("tensorrt", "11.4", target, f"engines/{target}.engine", graph.dimensions)
        for target in ("sm89", "sm120")
    )
    record = replace(record, engines=(*record.engines, *plans))
    text = component_config("vae_decoder", record, triton_engines("vae_decoder", record))
    config = parsed(text)
    assert config.platform == "tensorrt_plan"
    assert dict(config.cc_model_filenames) == {"8.9": "model.sm89.plan", "12.0": "model.sm120.plan"}
    strategy = config.parameters["execution_context_allocation_strategy"]
    assert strategy.string_value == "ON_PROFILE_CHANGE"


def test_a_component_without_a_backend_of_tritons_is_named(bundle: Bundle) -> None:
    record = bundle.manifest.components["t5"]
    others = tuple(replace(each, runtime="openvino") for each in record.engines)
    with pytest.raises(BundleError, match=r"t5 has engines for openvino.*--form pipeline"):
        triton_engines("t5", replace(record, engines=others))


def test_models_of_components_are_of_the_best_edition_for_triton() -> None:
    manifest = small_manifest(small_files())

    def taken(form: Form, *runtimes: str) -> Manifest:
        whole = Bundle(Path("/b"), with_editions(manifest, *runtimes), "0" * 64)
        return triton_edition(whole, form).manifest

    assert taken("bls", "openvino", "onnxruntime").runtime == "onnxruntime"
    assert taken("bls", "onnxruntime", "tensorrt").runtime == "tensorrt"
    assert len(taken("pipeline", "openvino", "onnxruntime").editions) == 1, "it picks by itself"
    with pytest.raises(BundleError, match=r"for openvino, native, and .*--form pipeline"):
        taken("bls", "openvino", "native")


def test_text_survives_the_text_format() -> None:
    text = 'a "quoted" back\\slash,\nπ 🎨 and \x01'
    config = parsed(render([("Two\nlines", {"name": text, "input": ({"dims": (1, -1)},)})]))
    assert config.name == text
    assert list(config.input[0].dims) == [1, -1]
    assert parsed(render([("", {"instance_group": {"kind": Enum("KIND_GPU")}})])).instance_group


@pytest.mark.parametrize("form", FORMS)
def test_nothing_leads_out_of_the_repository(bundle: Bundle, tmp_path: Path, form: Form) -> None:
    root = tmp_path / "models"
    write_repository(bundle, root, form, Settings())
    assert not [path for path in root.rglob("*") if path.is_symlink()]
    if form == "pipeline":
        assert open_bundle(root / "flux" / "1" / "bundle").content_hash == bundle.content_hash
    assert os.access(root / "run.sh", os.X_OK)
    texts = [path.read_text() for path in root.iterdir() if path.is_file()]
    assert not [text for text in texts if str(bundle.root) in text or "$model" in text]


def test_only_an_earlier_repository_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    write_repository(bundle, root, "bls", Settings())  # into an empty folder
    write_repository(bundle, root, "pipeline", Settings())
    assert not (root / "flux_t5").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["models"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for place in (other, other / "thesis.txt", bundle.root, bundle.root / "models", Path("/")):
        with pytest.raises(BundleError, match=r"another|new"):
            write_repository(bundle, place, "pipeline", Settings())
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_what_was_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    write_repository(bundle, root, "pipeline", Settings())
    before = sorted(tmp_path.rglob("*"))
    link, linked = repository_module.link_or_copy, []

    def full(source: Path, target: Path) -> object:
        linked.append(source)
        if len(linked) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return link(source, target)

    monkeypatch.setattr(repository_module, "link_or_copy", full)
    with pytest.raises(BundleError, match="disk is full"):
        write_repository(bundle, root, "bls", Settings())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--bundle", "nowhere"], 1, "There is no bundle"),
        (["--runtime", "caffe"], 2, "no runtime 'caffe'"),
        (["--form", "ensemble"], 2, "pipeline"),
        (["--out", "."], 1, "choose a new or an empty folder"),
        (["--timeout", "-1"], 2, "--timeout"),
    ],
)
def test_the_command_says_what_is_wrong(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    done = CliRunner().invoke(main, ["triton", "--bundle", str(bundle.root), *options])
    assert done.exit_code == code
    assert word in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_the_command_prints_what_it_wrote(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "models"
    command = ["triton", "--bundle", str(bundle.root), "--out", str(out), "--json"]
    done = CliRunner().invoke(main, command)
    assert json.loads(done.output) == {
        "repository": str(out),
        "form": "pipeline",
        "models": ["flux"],
    }


def text(*values: bytes) -> np.ndarray:
    return np.array(values, np.object_)


def test_a_request_becomes_the_arguments_of_a_call() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    for data in (file.getvalue(), base64.b64encode(file.getvalue())):
        asked = read_request(
            {
                "prompt": text(b"a ring", "ein Stück".encode()),
                "n": np.array([2], np.int32),
                "seed": np.array([2**64 - 1], np.uint64),
                "strength": np.array([0.7]),
                "image_bytes": text(data),
                "step_events": np.array([True]),
                "response_format": text(b"b64_json"),
            }
        )
        given = dict(asked.arguments)
        assert np.array_equal(np.asarray(given.pop("image")), image)
        assert given == {
            "prompt": ["a ring", "ein Stück"],
            "num_images_per_prompt": 2,
            "seed": 2**64 - 1,
            "strength": 0.7,
        }
        assert (asked.step_events, asked.left_out) == (True, {"image"})


def test_what_controlnets_take_reaches_the_other_side() -> None:
    pictures = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    given: dict[str, Any] = {
        "prompt": "a ring",
        "control_image": pictures,
        "control_mode": [2, None],
        "controlnet_conditioning_scale": 0.7,
        "control_guidance_start": [0.0, 0.25],
        "control_guidance_end": [0.9, 1],
    }
    tensors = {name: values for name, _, values in _tensors(given)}
    assert tensors["control_image_bytes"].shape == (2,)
    arguments = dict(read_request(tensors).arguments)
    assert [each.getpixel((0, 0)) for each in arguments.pop("control_image")] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    del given["control_image"]
    assert arguments == {**given, "prompt": ["a ring"]}
    alone = {"prompt": "a ring", "control_image": pictures[:1], "control_mode": None}
    tensors = {name: values for name, _, values in _tensors(alone)}
    assert read_request(tensors).arguments["control_image"].size == (6, 4)
    assert "control_mode" not in tensors
    with pytest.raises(UsageError, match="`control_image` has 'a' in it"):
        _tensors({"control_image": ["a", "b"]})


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"prompt": text(b"\xff")}, "UTF-8"),
        ({"height": np.array([16, 32], np.int32)}, r"`height` has shape \[2\]"),
        ({"image_bytes": text(b"GIF89a")}, "`image_bytes`"),
        ({"image_bytes": text(b"x"), "image": np.zeros((2, 2, 3), np.uint8)}, "both"),
        ({"response_format": text(b"url")}, "tensor or b64_json"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(tensors: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        read_request(tensors)


def test_a_parameter_that_somebody_broke_is_said() -> None:
    with pytest.raises(UsageError, match=r"config\.pbtxt"):
        Settings.read({"max_waiting": "many"})


def test_the_page_has_the_fields_of_the_model() -> None:
    page = ROOT / "docs" / "triton.md"
    for heading, fields in (("### A request", INPUTS), ("### A response", OUTPUTS)):
        (table,) = tables(section(page, heading))
        assert [row[:3] for row in table] == [
            [field.name, field.dtype, f"[{', '.join(map(str, field.dims))}]"] for field in fields
        ]
