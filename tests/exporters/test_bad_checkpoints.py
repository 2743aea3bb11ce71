"""What a bad checkpoint gets: one message that says what is wrong, before any long work.

Through the command line, so that none of them ends in a traceback. Nothing here traces a graph.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from fluxdeploy.cli import main
from tests.exporters.conftest import TRANSFORMER, VAE, Tensors, edit_json, edit_tensors

ROOT = Path(__file__).parents[2]
T5 = "text_encoder_2/model.safetensors"
CLIP = "text_encoder/model.safetensors"


def export(checkpoint: Path | str, out: Path, *components: str) -> Result:
    chosen = [word for name in components for word in ("--component", name)]
    arguments = [
        "export",
        str(checkpoint),
        *chosen,
        "--out",
        str(out),
        "--precision",
        "fp32",
        "--json",
    ]
    return CliRunner().invoke(main, arguments, prog_name="fluxdeploy")


def assert_refused(result: Result, *words: str) -> None:
    """One short message with these words, exit code 1, and no other output."""
    assert result.exit_code == 1, result.output
    message = " ".join(result.stderr.split())
    assert message.startswith("Error: ")
    assert "bug in fluxdeploy" not in message
    assert "Traceback" not in result.output
    assert len(message) < 800, message
    for word in words:
        assert word in message
    assert result.stdout == ""


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_with_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Folders that are no checkpoint.


def test_missing_folder(tmp_path: Path) -> None:
    assert_refused(export(tmp_path / "none", tmp_path / "out"), "There is no checkpoint at", "hub")


def test_unknown_user_in_path(tmp_path: Path) -> None:
    assert_refused(export("~nobody-has-this-name/x/y", tmp_path / "out"), "no checkpoint at")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(export(tmp_path / "empty", tmp_path / "out"), "is no FLUX.1 checkpoint")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_folder_of_pickles(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / f"old/flux{suffix}")
    assert_refused(export(tmp_path / "old", tmp_path / "out"), "pickles", "Convert")


def test_file_that_is_a_pickle(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "flux.safetensors")
    assert_refused(export(tmp_path / "flux.safetensors", tmp_path / "out"), "pickle")


def test_part_with_pickles_only(copy: Path, tmp_path: Path) -> None:
    (copy / TRANSFORMER).unlink()
    (copy / "transformer/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    assert_refused(export(copy, tmp_path / "out"), "pickles", "safetensors")


@pytest.mark.parametrize(
    "kind", ["StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "Flux2Pipeline", None]
)
def test_other_family(copy: Path, tmp_path: Path, kind: str | None) -> None:
    edit_json(copy / "model_index.json", _class_name=kind)
    assert_refused(export(copy, tmp_path / "out"), f"holds a {kind}", "FluxPipeline")


def test_other_family_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, path)
    assert_refused(export(path, tmp_path / "out"), "holds no FLUX.1 transformer", "double_blocks")


def test_several_transformers(bfl: Path, tmp_path: Path) -> None:
    shutil.copy(bfl / "flux1.safetensors", bfl / "flux2.safetensors")
    words = ("several transformers (flux1.safetensors, flux2.safetensors)", "name one of them")
    assert_refused(export(bfl, tmp_path / "out"), *words)


def test_hub_id_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxdeploy", "export", "nobody/flux", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "There is no local path nobody/flux, and the hub could not be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_hub_id_of_a_wrong_form(tmp_path: Path) -> None:
    assert_refused(export("nobody/flux--1..dev", tmp_path / "out"), "nobody/flux--1..dev")


# Files that are broken.


def test_truncated_file(copy: Path, tmp_path: Path) -> None:
    path = copy / TRANSFORMER
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-100])
    assert_refused(export(copy, tmp_path / "out"), str(path), "promises", "Download")


def test_truncated_header(copy: Path, tmp_path: Path) -> None:
    path = copy / VAE
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:40])
    assert_refused(export(copy, tmp_path / "out"), str(path), "header")


@pytest.mark.parametrize("offsets", [[0, 4], [10**12, 10**12 + 4], [4, 0], [-4, 0], [0], "0-4"])
def test_header_that_lies_about_offsets(copy: Path, tmp_path: Path, offsets: Any) -> None:
    header, data = header_of(copy / CLIP)
    header[sorted(header)[-1]]["data_offsets"] = offsets
    write_with_header(copy / CLIP, header, data)
    assert_refused(export(copy, tmp_path / "out"), str(copy / CLIP), "not a whole safetensors file")


def test_missing_shard(copy: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00001-of-2.safetensors"}}
    path = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_refused(export(copy, tmp_path / "out"), "lacks", "00001-of-2", "incomplete")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "..\\evil", ".."])
def test_index_that_leaves_its_folder(copy: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(copy / TRANSFORMER, copy / "evil.safetensors")
    path = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x_embedder.weight": name}}))
    assert_refused(export(copy, tmp_path / "out"), "outside its folder")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["x"]}, {"weight_map": {"x": 1}}])
def test_index_without_a_map(copy: Path, tmp_path: Path, index: dict[str, Any]) -> None:
    path = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_refused(export(copy, tmp_path / "out"), "no weight_map")


@pytest.mark.parametrize(
    "path",
    ["model_index.json", "transformer/config.json", "text_encoder_2/config.json"],
)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ', "not valid JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ('{"a": NaN}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_config_that_is_no_json_object(
    copy: Path, tmp_path: Path, path: str, text: str, words: str
) -> None:
    (copy / path).write_bytes(text.encode("latin-1"))
    assert_refused(export(copy, tmp_path / "out"), str(copy / path), words)


def test_missing_scheduler(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "scheduler")
    assert_refused(export(copy, tmp_path / "out"), "scheduler/scheduler_config.json")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_part(copy: Path, tmp_path: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    component = {"vae": "vae_decoder", "text_encoder": "clip", "text_encoder_2": "t5"}
    result = export(copy, tmp_path / "out", component.get(part, part))
    assert_refused(result, "has no", f"a folder {part}/")


# Tensors that do not fit.


def change_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor

    return change


LINEAR = "transformer_blocks.1.ff.net.2.bias"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (LINEAR, torch.zeros(95), ("has shape [95]", "[96]")),
        (LINEAR, torch.zeros(1, 96), ("has shape [1, 96]", "[96]")),
        (LINEAR, None, (f"has no tensor {LINEAR}", "incomplete")),
        (LINEAR, torch.zeros(96, dtype=torch.int64), ("stored as I64", "F32, F16, BF16")),
        (LINEAR, torch.zeros(96, dtype=torch.float64), ("stored as F64",)),
        (LINEAR, torch.tensor(1.0), ("single number",)),
        ("x_embedder.weight", torch.tensor(1.0), ("single number",)),
        ("x_embedder.weight", torch.zeros(96), ("2 axes are needed",)),
        ("x_embedder.weight", torch.zeros(0, 64), ("rows",)),
        ("x_embedder.weight", torch.zeros(96, 0), ("is empty",)),
        ("x_embedder.weight", torch.zeros(90, 64), ("norm_out.linear", "asks for 180")),
        ("x_embedder.weight", None, ("neither x_embedder.weight nor img_in.weight",)),
        ("transformer_blocks.0.attn.norm_q.weight", torch.zeros(0), ("is empty",)),
        ("transformer_blocks.0.attn.norm_q.weight", torch.zeros(36), ("no multiple of its head",)),
        ("context_embedder.weight", None, ("has no tensor context_embedder.weight",)),
    ],
)
def test_tensor_that_does_not_fit(
    copy: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, words: tuple[str, ...]
) -> None:
    edit_tensors(copy / TRANSFORMER, change_tensor(name, tensor))
    assert_refused(export(copy, tmp_path / "out", "transformer", "conditioner"), *words)


def test_gap_in_the_blocks(copy: Path, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("transformer_blocks.0.")]:
            del tensors[name]

    edit_tensors(copy / TRANSFORMER, drop)
    words = ("transformer_blocks up to number 1", "not number 0", "incomplete")
    assert_refused(export(copy, tmp_path / "out", "transformer"), *words)


@pytest.mark.parametrize("number", ["999999999", "9" * 5000])
@pytest.mark.parametrize(
    ("path", "component", "name"),
    [
        (TRANSFORMER, "transformer", "transformer_blocks.{}.attn.to_q.bias"),
        (TRANSFORMER, "transformer", "single_transformer_blocks.{}.attn.to_q.bias"),
        (VAE, "vae_decoder", "encoder.down_blocks.{}.resnets.0.conv1.weight"),
        (T5, "t5", "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        (CLIP, "clip", "encoder.layers.{}.mlp.fc1.bias"),
    ],
)
def test_huge_block_number_costs_nothing(
    copy: Path, tmp_path: Path, path: str, component: str, name: str, number: str
) -> None:
    def move(tensors: Tensors) -> None:
        old = name.format(1) if name.format(1) in tensors else "text_model." + name.format(1)
        tensors[old.replace(".1.", f".{number}.", 1)] = tensors.pop(old)

    edit_tensors(copy / path, move)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(export(copy, tmp_path / "out", component), "incomplete")
    # A network of that many blocks would take hundreds of gigabytes; imports take a little.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KB


def test_huge_block_number_in_bfl_layout(bfl: Path, tmp_path: Path) -> None:
    def move(tensors: Tensors) -> None:
        name = "decoder.up.1.block.0.conv1.bias"
        tensors[name.replace("1", "999999999", 1)] = tensors.pop(name)

    edit_tensors(bfl / "ae.safetensors", move)
    assert_refused(export(bfl, tmp_path / "out", "vae_decoder"), "incomplete")


def test_foreign_tensor_in_a_bfl_transformer(bfl: Path, tmp_path: Path) -> None:
    path = bfl / "flux1.safetensors"
    for name in ("controlnet_blocks.0.weight", "img_in.lora_A", "double_blocks.0.img_attn.qkv.q"):
        edit_tensors(path, lambda tensors, name=name: tensors.update({name: torch.zeros(2)}))
        assert_refused(export(bfl, tmp_path / "out"), name, "does not belong to a FLUX.1")
        edit_tensors(path, change_tensor(name, None))


@pytest.mark.parametrize(
    "name", ["encoder_hid_proj.weight", "x_embedder.lora_A", "transformer_blocks.0.attn.to_q.scale"]
)
def test_foreign_tensor_in_a_diffusers_transformer(copy: Path, tmp_path: Path, name: str) -> None:
    edit_tensors(copy / TRANSFORMER, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert_refused(export(copy, tmp_path / "out"), name, "does not belong to a FLUX.1")


def test_vae_of_another_family(copy: Path, tmp_path: Path) -> None:
    edit_tensors(copy / VAE, lambda tensors: tensors.update({"quant_conv.weight": torch.zeros(2)}))
    assert_refused(export(copy, tmp_path / "out", "vae_decoder"), "quant convolutions")


@pytest.mark.parametrize("groups", [7, 0, "8", None])
def test_vae_with_wrong_groups(copy: Path, tmp_path: Path, groups: Any) -> None:
    edit_json(copy / "vae/config.json", norm_num_groups=groups)
    assert_refused(export(copy, tmp_path / "out", "vae_decoder"), "norm_num_groups")


# Configs that contradict the tensors.


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("text_encoder", {"model_type": "bert"}, "model_type 'bert'"),
        ("text_encoder_2", {"model_type": "bert"}, "model_type 'bert'"),
        ("text_encoder", {"hidden_size": "wide"}, "config.json is not valid"),
        ("text_encoder", {"hidden_size": 44}, "has shape"),
        ("text_encoder", {"num_attention_heads": 7}, "multiple of the number"),
        ("text_encoder", {"num_attention_heads": 0}, "num_attention_heads 0; 1 to"),
        ("text_encoder", {"hidden_act": "nonsense"}, "activation 'nonsense'"),
        ("text_encoder", {"num_hidden_layers": 3}, "has 2 layers"),
        ("text_encoder", {"max_position_embeddings": 78}, "position_embedding"),
        ("text_encoder_2", {"num_layers": 1}, "has 2 layers"),
        ("text_encoder_2", {"num_heads": 4}, "relative_attention_bias"),
        ("text_encoder_2", {"d_kv": 7}, "has shape"),
        ("text_encoder_2", {"vocab_size": 10}, "shared.weight"),
        ("text_encoder_2", {"feed_forward_proj": "double-gelu"}, "config.json is not valid"),
        ("text_encoder_2", {"dense_act_fn": "nonsense"}, "activation 'nonsense'"),
    ],
)
def test_text_config_that_does_not_fit(
    copy: Path, tmp_path: Path, part: str, changes: dict[str, Any], words: str
) -> None:
    edit_json(copy / part / "config.json", **changes)
    component = {"text_encoder": "clip", "text_encoder_2": "t5"}[part]
    assert_refused(export(copy, tmp_path / "out", component), words)


def test_missing_text_config(copy: Path, tmp_path: Path) -> None:
    (copy / "text_encoder_2/config.json").unlink()
    assert_refused(export(copy, tmp_path / "out", "t5"), "no config.json")


# What only a build looks at: parts that do not belong together.


def build(checkpoint: Path, out: Path) -> Result:
    arguments = ["build", str(checkpoint), "--out", str(out), "--precision", "fp32", "--json"]
    return CliRunner().invoke(main, arguments, prog_name="fluxdeploy")


@pytest.mark.parametrize(
    ("layout", "name"), [("copy", "x_embedder.weight"), ("bfl", "img_in.weight")]
)
def test_channels_of_no_task(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, name: str
) -> None:
    folder: Path = request.getfixturevalue(layout)
    path = folder / (TRANSFORMER if layout == "copy" else "flux1.safetensors")
    edit_tensors(path, change_tensor(name, torch.zeros(96, 100)))
    config = folder / ("transformer/config.json" if layout == "copy" else "config.json")
    edit_json(config, in_channels=100, out_channels=64)
    words = ("takes 100 channels", "384 for fill", "128 for control")
    assert_refused(build(folder, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_text_encoder_of_another_checkpoint(copy: Path, tmp_path: Path) -> None:
    edit_tensors(copy / TRANSFORMER, change_tensor("context_embedder.weight", torch.zeros(96, 50)))
    edit_json(copy / "transformer/config.json", joint_attention_dim=50)
    assert_refused(build(copy, tmp_path / "out"), "T5's width is 48", "trained on 50")


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_missing_tokenizer(copy: Path, tmp_path: Path, folder: str) -> None:
    shutil.rmtree(copy / folder)
    assert_refused(build(copy, tmp_path / "out"), "no tokenizer", f"a folder {folder}/")
    assert not (tmp_path / "out").exists()


def test_sizes_do_not_need_the_data(source: Path, tmp_path: Path) -> None:
    """Opening reads headers: a checkpoint that is larger than the disk opens at once."""
    from exporters.checkpoint import open_checkpoint
    from fluxdeploy.bundle.tensorfile import write_sparse

    copy = shutil.copytree(source, tmp_path / "sparse")
    shapes = {name: tuple(t.shape) for name, t in load_file(copy / TRANSFORMER).items()}
    shapes["transformer_blocks.0.ff.net.0.proj.weight"] = (10**10, 96)
    (copy / TRANSFORMER).unlink()
    write_sparse(copy / TRANSFORMER, [(name, "F32", shape) for name, shape in shapes.items()])
    assert open_checkpoint(copy).transformer.mlp_width == 10**10
