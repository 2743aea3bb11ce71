"""LoRA files of every trainer against what diffusers' own converters make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import save_file

from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora import LoraFile, read_lora

_WIDTH, _MLP = 3072, 12288  # diffusers' converter of kohya's names has these sizes in its code
_RANK = 4
_BLOCK, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
LINEARS = {
    "transformer": {
        **{f"{_BLOCK}.attn.{n}": (_WIDTH, _WIDTH) for n in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"{_SINGLE}.attn.{n}": (_WIDTH, _WIDTH) for n in ("to_q", "to_k", "to_v")},
        f"{_SINGLE}.proj_mlp": (_MLP, _WIDTH),
        "norm_out.scale": (_WIDTH, _WIDTH),
        "norm_out.shift": (_WIDTH, _WIDTH),
    },
    "clip": {"text_model.encoder.layers.0.self_attn.q_proj": (8, 8)},
}
Tensors = dict[str, torch.Tensor]


def _pair(module: str, down: str, up: str, out: int, width: int = _WIDTH) -> Tensors:
    draw = torch.Generator().manual_seed(len(module))
    return {
        module + down: torch.randn(_RANK, width, generator=draw),
        module + up: torch.randn(out, _RANK, generator=draw),
    }


def _write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def _kohya() -> Tensors:
    down, up = ".lora_down.weight", ".lora_up.weight"
    image, single = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    final = "lora_unet_final_layer_adaLN_modulation_1"
    encoder = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    alphas = {f"{module}.alpha": torch.tensor(2.0) for module in (image, single, encoder)}
    return {
        **_pair(image, down, up, 3 * _WIDTH),
        **_pair(single, down, up, 3 * _WIDTH + _MLP),
        **_pair(final, down, up, 2 * _WIDTH),
        **_pair(encoder, down, up, 8, 8),
        **alphas,
    }


def _xlabs() -> Tensors:
    down, up = ".down.weight", ".up.weight"
    return {
        **_pair("double_blocks.0.processor.qkv_lora1", down, up, 3 * _WIDTH),
        **_pair("double_blocks.0.processor.proj_lora1", down, up, _WIDTH),
    }


def _peft() -> Tensors:
    return _pair(f"transformer.{_BLOCK}.attn.to_q", ".lora_A.weight", ".lora_B.weight", _WIDTH)


@pytest.mark.parametrize(
    ("tensors", "convert"),
    [
        (_kohya(), converters._convert_kohya_flux_lora_to_diffusers),
        (_xlabs(), converters._convert_xlabs_flux_lora_to_diffusers),
        (_peft(), dict),
    ],
    ids=["kohya", "xlabs", "peft"],
)
def test_every_format_changes_what_it_changes_in_diffusers(
    tensors: Tensors, convert: object, tmp_path: Path
) -> None:
    lora = read_lora(_write(tmp_path / "x.safetensors", tensors), LINEARS)
    expected = convert(dict(tensors))  # type: ignore[operator]
    seen = set()
    for part, changes in lora.changes.items():
        for name, change in changes.items():
            found = change.scale * (change.up()[:5] @ change.down())
            target, rows = name, slice(0, 5)
            if name.startswith("norm_out."):
                start = 0 if name == "norm_out.scale" else _WIDTH
                target, rows = "norm_out.linear", slice(start, start + 5)
            ups = [k for k in expected if "lora_B" in k or ".up." in k]
            # CLIP has one linear here, and other names in diffusers.
            name_there = "text_model" if part == "clip" else f".{target}."
            (up_key,) = (k for k in ups if name_there in f".{k}")
            down_key = up_key.replace("lora_B", "lora_A").replace(".up.", ".down.")
            seen |= {up_key, down_key}
            wanted = (expected[up_key][rows] @ expected[down_key]).numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=part)
    assert seen == set(expected)


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transformer.tr", "tr"),
        ("transformer.tr", "base_model.model.tr"),
        ("transformer.tr", "diffusion_model.tr"),
        (".lora_A.", ".lora_A.default."),
        ("A.weight", "A"),
    ],
)
def test_names_differ_and_mean_the_same(old: str, new: str, tmp_path: Path) -> None:
    tensors = _renamed(_peft(), old, new)
    lora = read_lora(_write(tmp_path / "x.safetensors", tensors), LINEARS)
    assert list(lora.changes["transformer"]) == [f"{_BLOCK}.attn.to_q"]


def test_metadata_of_diffusers_scales_a_lora(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 4}'}
    change = read_lora(_write(path, _peft(), metadata), LINEARS).changes["transformer"]
    assert change[f"{_BLOCK}.attn.to_q"].scale == 2.0


def test_the_config_beside_a_file_of_peft_scales_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "adapter_model.safetensors", _peft())
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_alpha": 16, "r": 4, "use_rslora": true}')
    change = read_lora(path, LINEARS).changes["transformer"]
    assert change[f"{_BLOCK}.attn.to_q"].scale == 8.0
    assert LoraFile(path).files == (path, config)
    for text, words in (("[", "is not JSON"), ('{"use_dora": true}', "DoRA")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_lora(path, LINEARS)


def _with(key: str, value: torch.Tensor | None = None) -> Tensors:
    return {**_peft(), key: torch.ones(1) if value is None else value}


_A, _B = f"transformer.{_BLOCK}.attn.to_q.lora_A.weight", "B.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no tensors"),
        ({_A: _peft()[_A]}, "lacks its factor `up`"),
        (_with(_A, torch.zeros(0, _WIDTH)), "the rank"),
        (_with(_A, torch.randn(3, _WIDTH)), "the rank"),
        (_with(_A, torch.randn(_RANK, 1536)), "another model"),
        (_with(_A, torch.full((_RANK, _WIDTH), torch.nan)), "NaN"),
        (_with("transformer.x.dora_scale"), "DoRA"),
        (_with("transformer.x.lokr_w1"), "LoKr"),
        (_with("transformer.x.hada_w1_a"), "LoHa"),
        (_with("double_blocks.0.img_attn.norm.query_norm.scale"), "replaces norms, by its key"),
        (_with("double_blocks.0.img_attn.proj.lora_B.bias"), "adds to biases, by its key"),
        (_with(f"transformer.{_BLOCK}.attn.to_q.lora_A.bias"), "biases of its inner layers"),
        (_with("lora_unet_single_blocks_0_linear1.diff_b"), "whole tensors"),
        (_with("strange.weight"), "strange.weight"),
        (_renamed(_peft(), "attn.to_q", "attn.to_qkv_mlp_proj"), "FLUX.2"),
        (_renamed(_peft(), f"{_BLOCK}.attn", "down_blocks.0.attn"), "Stable Diffusion"),
        (_renamed(_peft(), f"{_BLOCK}.", "blocks.0.self_"), "Wan"),
        (_renamed(_peft(), "blocks.0", "blocks.7"), "more blocks"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_model_is_refused_by_name(
    tensors: Tensors, words: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_lora(path, LINEARS)
    assert "x.safetensors" in str(caught.value)


def _bfl_control(blocks: tuple[int, int] = (19, 38)) -> Tensors:
    """A control LoRA of rank 2 by BFL's names, of linears as narrow as diffusers' converter takes.

    That has FLUX.1's numbers of blocks in its code, and the width where it splits `linear1`.
    """
    rows = {"img_in": 4, "txt_in": 4, "final_layer.linear": 4, "final_layer.adaLN_modulation.1": 8}
    for module in ("time_in", "vector_in", "guidance_in"):
        rows |= {f"{module}.in_layer": 4, f"{module}.out_layer": 4}
    norms = []
    for i in range(blocks[0]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            rows |= {f"{block}_{m}": 4 for m in ("mod.lin", "attn.proj", "mlp.0", "mlp.2")}
            rows[f"{block}_attn.qkv"] = 12
            norms += [f"{block}_attn.norm.query_norm", f"{block}_attn.norm.key_norm"]
    for i in range(blocks[1]):
        block = f"single_blocks.{i}"
        rows |= {f"{block}.modulation.lin": 4, f"{block}.linear2": 4}
        rows[f"{block}.linear1"] = 3 * _WIDTH + _MLP
        norms += [f"{block}.norm.query_norm", f"{block}.norm.key_norm"]
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{norm}.scale": torch.randn(2, generator=draw) for norm in norms}
    for module, count in rows.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, 3, generator=draw)
        tensors[f"{module}.lora_B.weight"] = torch.randn(count, 2, generator=draw)
        tensors[f"{module}.lora_B.bias"] = torch.randn(count, generator=draw)
    return tensors


def test_a_control_lora_of_bfl_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    tensors = _bfl_control()
    found = converters._convert_bfl_flux_control_lora_to_diffusers(dict(tensors))
    found = {name.removeprefix("transformer."): value.numpy() for name, value in found.items()}
    for kind in ("lora_B.weight", "lora_B.bias", "lora_A.weight"):
        # Two linears in the graphs. The swap of shift and scale is one of rows alone: that of
        # diffusers, which swaps the ranks of lora_A too, makes another product than BFL's code.
        whole = found.pop(f"norm_out.linear.{kind}")
        scale, shift = (whole[::-1],) * 2 if "A" in kind else np.split(whole, 2)
        found |= {f"norm_out.scale.{kind}": scale, f"norm_out.shift.{kind}": shift}
    shapes = {
        name.removesuffix(".lora_B.weight"): (len(value), 2 if name.startswith("x_emb") else 3)
        for name, value in found.items()
        if name.endswith(".lora_B.weight")
    }
    norms = {n.removesuffix(".weight"): 2 for n in found if ".norm_" in n and "lora" not in n}
    path = _write(tmp_path / "x.safetensors", tensors)
    lora = read_lora(path, {"transformer": shapes}, norms=norms)
    assert lora.reads == 3
    assert lora.norms.keys() == norms.keys()
    changes, biases = lora.changes["transformer"], lora.biases["transformer"]
    assert changes.keys() == biases.keys() == shapes.keys()
    for name, (rows, _) in shapes.items():
        np.testing.assert_array_equal(changes[name].up(), found[f"{name}.lora_B.weight"])
        np.testing.assert_array_equal(changes[name].down(), found[f"{name}.lora_A.weight"])
        bias = biases[name].add_to(np.zeros(rows, np.float32), 0.5)
        np.testing.assert_array_equal(bias, 0.5 * found[f"{name}.lora_B.bias"])
    for name, norm in lora.norms.items():
        own = norm.add_to(np.ones(2, np.float32), 0.5)
        np.testing.assert_array_equal(own, found[f"{name}.weight"])


def test_a_lora_of_the_latents_channels_changes_no_others(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "x.safetensors", _pair("x_embedder", ".lora_A.weight", ".lora_B.weight", 8, 64)
    )
    linears = {"transformer": {"x_embedder": (8, 128), "proj_out": (64, 8)}}
    lora = read_lora(path, linears)
    down = lora.changes["transformer"]["x_embedder"].down()
    assert down.shape == (_RANK, 128)
    assert lora.reads is None
    assert down[:, :64].any()
    assert not down[:, 64:].any()
