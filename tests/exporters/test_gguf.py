"""GGUF files: what is read of them, and what is wrong with those that are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file

from exporters.checkpoint import Checkpoint, Weights, open_checkpoint
from exporters.checkpoint.gguf import read_gguf
from exporters.checkpoint.tensors import read_stored
from exporters.checkpoint.text_configs import with_aliases
from exporters.weights.decide import Storing, decide
from fluxdeploy.build.checkpoint import hash_checkpoint
from fluxdeploy.build.describe import checkpoint_origin
from fluxdeploy.errors import CheckpointError
from fluxdeploy.progress import Progress
from tests.exporters.numbers import GRAPHS
from tests.support.gguf_file import ARRAY, STRING, U32, GgufFile, GgufTensor, text, value

ONE = GgufTensor(0, (4, 2), bytes(range(32)))


def read_bytes(folder: Path, data: bytes) -> Any:
    path = folder / "flux1-dev.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def quantized(folder: Path, source: Path, name: str = "flux1-dev-Q8_0.gguf") -> Path:
    """A BFL transformer as city96's converter writes it: Q8_0, and vectors as they are."""
    tensors = {}
    for key, values in load_file(source).items():
        kind, data = 0, values.astype("<f4").tobytes()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind, data = 8, to_q8_0(values)
        tensors[key] = GgufTensor(kind, tuple(reversed(values.shape)), data)
    return GgufFile(tensors).write(folder / name)


def to_q8_0(values: np.ndarray) -> bytes:
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
    codes = np.round(blocks / np.maximum(scale.astype(np.float32), 1e-9)).astype("i1")
    return np.concatenate([scale.view("u1"), codes.view("u1")], axis=1).tobytes()


def worst(one: Weights, other: Weights) -> float:
    """The largest difference, as a share of each tensor's largest number."""
    assert one.keys() == other.keys()
    return max(
        float(np.abs(one[n].read() - other[n].read()).max() / np.abs(other[n].read()).max())
        for n in other
    )


@pytest.fixture
def folder(bfl: Path) -> Path:
    """A checkpoint in BFL's layout whose transformer is a GGUF file."""
    quantized(bfl, bfl / "flux1.safetensors")
    (bfl / "flux1.safetensors").unlink()
    return bfl


@pytest.mark.parametrize("named", [True, False])
def test_a_transformer_in_gguf(folder: Path, opened: Checkpoint, named: bool) -> None:
    read = open_checkpoint(folder / "flux1-dev-Q8_0.gguf" if named else folder)
    assert read.transformer == opened.transformer
    weights = read.part("transformer").weights
    # Half a step of the largest number is 1/254 of it.
    assert 1e-3 < worst(weights, opened.part("transformer").weights) < 1 / 250
    assert read.rounded == {"transformer": ("Q8_0",)}
    assert any("stored as Q8_0 and widened" in notice for notice in read.notices)
    assert not open_checkpoint(opened.root).rounded


def test_the_manifest_says_what_the_weights_were_stored_as(
    folder: Path, opened: Checkpoint
) -> None:
    origin = checkpoint_origin("x", open_checkpoint(folder), None)
    assert origin["stored_as"] == {"transformer": "Q8_0"}
    assert "stored_as" not in checkpoint_origin("x", opened, None)


def test_a_file_that_was_replaced_since_it_was_opened(folder: Path) -> None:
    read = open_checkpoint(folder)
    hash_checkpoint(read, Progress(quiet=True))
    path = folder / "flux1-dev-Q8_0.gguf"
    tensors = {f"x{number}": ONE for number in range(3)}
    GgufFile(tensors).write(path)
    with pytest.raises(CheckpointError, match="was changed while the checkpoint was read"):
        hash_checkpoint(read, Progress(quiet=True))


def test_weights_of_gguf_are_never_linked(folder: Path) -> None:
    """A graph points into a checkpoint's own file only where that is safetensors."""
    read = open_checkpoint(folder)
    chain, _ = GRAPHS["transformer"].source(read, "fp32")
    places = decide(chain, read.part("transformer").weights, None)
    assert {place.how for place in places} == {Storing.CONVERTED}


def test_a_file_of_the_package_gguf(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_quantization_version(2)
    writer.add_array("tokens", ["a", "bc", ""])
    writer.add_array("numbers", list(range(20)))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(values, q8_0)
    writer.add_tensor("w.weight", packed, raw_dtype=q8_0)
    writer.add_tensor("b.bias", values[0])
    writer.add_tensor("h", values[:1].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_stored([path])
    assert {name: (t.shape, t.stored_type) for name, t in stored.items()} == {
        "w.weight": ((3, 64), "Q8_0"),
        "b.bias": ((64,), "F32"),
        "h": ((1, 64), "F16"),
    }
    assert (stored["w.weight"].read() == gguf.quants.dequantize(packed, q8_0).reshape(-1)).all()
    assert (stored["b.bias"].read() == values[0]).all()
    assert (stored["h"].read() == values[0].astype(np.float16)).all()


@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_files_without_an_architecture(tmp_path: Path, version: int) -> None:
    data = GgufFile({"a": ONE, "b": ONE}, {}, version=version).to_bytes()
    entries = read_bytes(tmp_path, data)
    assert [entry.shape for entry in entries.values()] == [(2, 4), (2, 4)]
    assert data[entries["b"].offset :] == ONE.data


def test_another_alignment_and_padding_at_the_end(tmp_path: Path) -> None:
    file = GgufFile({"a": ONE, "b": ONE}, alignment=64)
    file.metadata["general.alignment"] = value(U32, 64)
    data = file.to_bytes()
    entries = read_bytes(tmp_path, data + bytes(32))
    assert entries["b"].offset == len(data) - 32
    assert entries["b"].offset % 64 == 0


def test_a_tensor_that_was_folded_into_whole_rows(tmp_path: Path) -> None:
    file = GgufFile({"a": ONE})
    file.metadata["comfy.gguf.orig_shape.a"] = value(ARRAY, [1, 2, 2, 2], 5)
    assert read_bytes(tmp_path, file.to_bytes())["a"].shape == (1, 2, 2, 2)
    file.metadata["comfy.gguf.orig_shape.a"] = value(ARRAY, [3, 2], 5)
    with pytest.raises(CheckpointError, match=r"orig_shape\.a' is \[3, 2\].*\[2, 4\]"):
        read_bytes(tmp_path, file.to_bytes())


def with_metadata(**changes: bytes) -> GgufFile:
    return GgufFile({"a": ONE}, {key.replace("__", "."): pair for key, pair in changes.items()})


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "big endian": (
        lambda: b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "big-endian machines, which is not read",
    ),
    "version 1": (lambda: GgufFile({}, version=1).to_bytes(), "version 1; versions 2 and 3"),
    "version 4": (lambda: GgufFile({}, version=4).to_bytes(), "version 4; versions 2 and 3"),
    "no version": (lambda: b"GGUF\3", "the file ends before its version"),
    "another architecture": (
        lambda: with_metadata(general__architecture=value(STRING, "llama")).to_bytes(),
        "of the architecture 'llama'; flux and t5encoder are read",
    ),
    "an architecture that is a number": (
        lambda: with_metadata(general__architecture=value(U32, 3)).to_bytes(),
        "of the architecture 3;",
    ),
    "a part of several": (
        lambda: with_metadata(split__count=value(2, 3)).to_bytes(),
        "one of 3 parts.*gguf-split --merge",
    ),
    "many tensors": (
        lambda: GgufFile({"a": ONE}, counts=(2**63, 1)).to_bytes(),
        "9223372036854775808 tensors, more than its bytes can hold",
    ),
    "many entries": (
        lambda: GgufFile({"a": ONE}, counts=(1, 2**40)).to_bytes(),
        "1099511627776 entries of metadata, more than",
    ),
    "a long string": (
        lambda: with_metadata(x=struct.pack("<IQ", STRING, 2**62)).to_bytes(),
        "the file ends before the end of the value of 'x'",
    ),
    "a long array": (
        lambda: with_metadata(x=struct.pack("<IIQ", ARRAY, 4, 2**61)).to_bytes(),
        "numbers in 'x', more than its bytes can hold",
    ),
    "arrays in an array": (
        lambda: with_metadata(x=struct.pack("<IIQ", ARRAY, ARRAY, 1)).to_bytes(),
        "'x' is of the unknown type 9",
    ),
    "a type of metadata": (
        lambda: with_metadata(x=struct.pack("<I", 77)).to_bytes(),
        "'x' is of the unknown type 77",
    ),
    "a key twice": (
        lambda: GgufFile(
            {}, {"a": value(U32, 1) + text("a") + value(U32, 1)}, counts=(0, 2)
        ).to_bytes(),
        "has the key 'a' twice",
    ),
    "a key that is no text": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"\xff") + value(U32, 1),
        "the key of entry 0 of its metadata is not UTF-8",
    ),
    "no power of 2": (
        lambda: with_metadata(general__alignment=value(U32, 24)).to_bytes(),
        "general.alignment is 24, not a power of 2",
    ),
    "no alignment": (
        lambda: with_metadata(general__alignment=value(U32, 0)).to_bytes(),
        "general.alignment is 0",
    ),
    "a tensor twice": (
        lambda: GgufFile({"a": ONE, "b": ONE}).to_bytes().replace(text("b"), text("a"), 1),
        "it has the tensor 'a' twice",
    ),
    "no tensors": (lambda: b"GGUF\3\0\0\0" + bytes(400), "it has no tensors"),
    "many axes": (
        lambda: GgufFile({"a": GgufTensor(0, (1,) * 5, bytes(4))}).to_bytes(),
        "'a' has 5 axes; at most 4",
    ),
    "large sizes": (
        lambda: GgufFile({"a": GgufTensor(0, (0, 2**62, 2), b"")}).to_bytes(),
        "'a' has sizes that are too large",
    ),
    "an unknown type": (
        lambda: GgufFile({"a": GgufTensor(5, (4,), bytes(16))}).to_bytes(),
        "the tensor 'a' is of the unknown type 5",
    ),
    "a type that is not read": (
        lambda: GgufFile({"a.weight": GgufTensor(23, (256,), bytes(136))}).to_bytes(),
        "Tensor 'a.weight' in .* is stored as IQ4_XS, which is not read: use or make .* Q8_0",
    ),
    "rows of no whole blocks": (
        lambda: GgufFile({"a": GgufTensor(12, (96, 8), bytes(432))}).to_bytes(),
        "'a' have 96 numbers, and blocks of Q4_K have 256",
    ),
    "overlapping": (
        lambda: GgufFile({"a": ONE, "b": GgufTensor(0, (8,), bytes(32), 0)}).to_bytes(),
        "the tensor 'b' overlaps the one before it",
    ),
    "out of its place": (
        lambda: GgufFile({"a": GgufTensor(0, (8,), bytes(32), 64)}).to_bytes(),
        "the tensor 'a' is out of its place: .* byte 64 of the data instead of 0",
    ),
    "past the end": (
        lambda: GgufFile({"a": ONE, "b": GgufTensor(0, (9,), bytes(32))}).to_bytes(),
        "the tensor 'b' ends at",
    ),
    "cut": (lambda: GgufFile({"a": ONE}).to_bytes()[:-1], "the tensor 'a' ends at"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_files_that_are_refused(tmp_path: Path, kind: str) -> None:
    make, words = WRONG[kind]
    with pytest.raises(CheckpointError, match=words) as caught:
        read_bytes(tmp_path, make())
    message = str(caught.value)
    assert "flux1-dev.gguf" in message
    assert "\n" not in message


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    file = with_metadata(general__architecture=value(STRING, "flux"), x=value(ARRAY, ["a"], STRING))
    data = file.to_bytes()
    for length in range(4, len(data)):
        with pytest.raises(CheckpointError, match=r"flux1-dev\.gguf is not a whole GGUF file"):
            read_bytes(tmp_path, data[:length])


def test_a_gguf_file_under_another_name(folder: Path, opened: Checkpoint) -> None:
    (folder / "flux1-dev-Q8_0.gguf").rename(folder / "model.safetensors")
    read = open_checkpoint(folder / "model.safetensors")
    assert read.transformer == opened.transformer


def test_several_in_a_folder_and_none(folder: Path) -> None:
    (folder / "b.gguf").write_bytes((folder / "flux1-dev-Q8_0.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="several transformers"):
        open_checkpoint(folder)
    assert open_checkpoint(folder / "b.gguf").part("transformer")
    empty = GgufFile({"a": ONE}).write(folder / "c.gguf")
    with pytest.raises(CheckpointError, match=r"c\.gguf holds no FLUX\.1 transformer"):
        open_checkpoint(empty)


def test_another_family_of_the_same_architecture(folder: Path) -> None:
    """Converters call Chroma flux too."""
    names = ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight")
    path = GgufFile(dict.fromkeys(names, ONE)).write(folder / "chroma.gguf")
    with pytest.raises(CheckpointError, match="a checkpoint of Chroma"):
        open_checkpoint(path)


def test_t5_names_are_those_of_llama_cpp() -> None:
    gguf: Any = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    block = "encoder.block.7.layer"
    originals = [
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        f"{block}.0.layer_norm.weight",
        f"{block}.1.layer_norm.weight",
        *(f"{block}.0.SelfAttention.{name}.weight" for name in "qkvo"),
        *(f"{block}.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")),
    ]
    converted = {names.get_name(name, try_suffixes=(".weight",)): name for name in originals}
    assert None not in converted
    for name, renamed in with_aliases({name: name for name in converted}, "t5").items():
        assert renamed in converted
        assert converted[renamed] == name


def test_a_t5_encoder_in_gguf_beside(bfl: Path, opened: Checkpoint) -> None:
    file = bfl / "text_encoder_2/model.safetensors"
    gguf_names = {
        "shared": "token_embd",
        "encoder.final_layer_norm": "enc.output_norm",
        "encoder.block": "enc.blk",
        ".layer.0.SelfAttention.relative_attention_bias": ".attn_rel_b",
        ".layer.0.SelfAttention.": ".attn_",
        ".layer.0.layer_norm": ".attn_norm",
        ".layer.1.layer_norm": ".ffn_norm",
        ".layer.1.DenseReluDense.wi_0": ".ffn_gate",
        ".layer.1.DenseReluDense.wi_1": ".ffn_up",
        ".layer.1.DenseReluDense.wo": ".ffn_down",
    }
    tensors = {}
    for name, values in load_file(file).items():
        if name == "encoder.embed_tokens.weight":
            continue
        for old, new in gguf_names.items():
            name = name.replace(old, new)
        tensors[name] = GgufTensor(1, tuple(reversed(values.shape)), values.astype("<f2").tobytes())
    GgufFile(
        tensors,
        {
            "general.architecture": value(STRING, "t5encoder"),
            "tokenizer.ggml.tokens": value(ARRAY, ["a", "<pad>"] * 40, STRING),
        },
    ).write(bfl / "t5-v1_1-xxl-encoder-F16.gguf")
    file.unlink()
    read = open_checkpoint(bfl)
    assert worst(read.part("t5").weights, opened.part("t5").weights) < 2**-11
    assert read.t5.num_layers == 2


def test_values_that_are_not_finite_are_named(folder: Path) -> None:
    path = folder / "flux1-dev-Q8_0.gguf"
    stored = open_checkpoint(path).part("transformer").weights["proj_out.weight"]
    data = bytearray(path.read_bytes())
    data[stored.offset : stored.offset + 2] = b"\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.weight holds NaN"):
        stored.read()


def test_a_file_that_is_cut_while_it_is_read(folder: Path) -> None:
    path = folder / "flux1-dev-Q8_0.gguf"
    stored = open_checkpoint(path).part("transformer").weights["proj_out.weight"]
    path.write_bytes(path.read_bytes()[: stored.offset + 10])
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        stored.read()


def test_a_safetensors_file_that_is_named_as_gguf(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="of no known kind"):
        open_checkpoint(tmp_path / "x.gguf")
