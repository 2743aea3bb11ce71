"""Downloads from a hub on this machine: what is fetched, and what failures are called."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import huggingface_hub
from huggingface_hub import constants

from exporters.checkpoint import open_checkpoint
from exporters.checkpoint.hub import download
from fluxdeploy.bundle.tensorfile import write_sparse
from fluxdeploy.errors import CheckpointError
from tests.support.hub import COMMIT, Hub, serving

TOKEN = "hf_thisIsNoTokenOfAnyone"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub without files yet, which the hub's library takes for the real one."""
    served = Hub({})
    with serving(served) as address:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # The hub's library waits and asks again where the hub is busy.
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield served


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def safetensors(tmp_path: Path, *names: str) -> bytes:
    write_sparse(tmp_path / "made.safetensors", [(name, "F16", (4, 4)) for name in names])
    return (tmp_path / "made.safetensors").read_bytes()


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


UNUSED = (
    "README.md",
    "config.json",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "dev_grid.jpg",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "transformer/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/flax_model.msgpack",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors",
    "tokenizer/training_args.bin",
    "vae_decoder/model.onnx",
    "onnx/transformer.safetensors",
    "safety_checker/model.safetensors",
    "transformer/old/diffusion_pytorch_model.safetensors",
)


def test_of_a_diffusers_repository_only_what_is_read(hub: Hub, source: Path) -> None:
    read = files_of(source)
    hub.files = read | dict.fromkeys(UNUSED, b"{}")
    opened = open_checkpoint("acme/flux")
    assert (opened.layout, opened.revision) == ("diffusers", COMMIT)
    assert set(hub.asked) == read.keys()
    assert opened.transformer == open_checkpoint(source).transformer
    # All of it is in the cache now: with the network gone it opens again.
    hub.status = lambda path: (503, "")
    assert open_checkpoint("acme/flux").revision == COMMIT


def test_shards_are_those_of_the_index(hub: Hub, source: Path) -> None:
    file = "vae/diffusion_pytorch_model.safetensors"
    hub.files = files_of(source)
    body = hub.files.pop(file)
    shard = "vae/diffusion_pytorch_model-00001-of-00001.safetensors"
    names = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    weight_map = dict.fromkeys(names.keys() - {"__metadata__"}, shard.rpartition("/")[2])
    index = {"weight_map": weight_map}
    hub.files |= {shard: body, f"{file}.index.json": json.dumps(index).encode()}
    hub.files["vae/diffusion_pytorch_model-00001-of-00003.safetensors"] = b"of another time"
    assert open_checkpoint("acme/flux").vae == open_checkpoint(source).vae
    assert shard in hub.asked
    assert not any("of-00003" in name for name in hub.asked)


@pytest.mark.parametrize("revision", ["v1", COMMIT, "main"])
def test_a_named_revision(hub: Hub, source: Path, revision: str) -> None:
    hub.files = files_of(source)
    assert open_checkpoint(f"acme/flux@{revision}").revision == COMMIT


@pytest.mark.parametrize("suffix", ["safetensors", "sft"])
def test_a_repository_of_root_files(hub: Hub, bfl: Path, suffix: str) -> None:
    body = (bfl / "flux1.safetensors").read_bytes()
    hub.files = {
        f"flux1-dev.{suffix}": body,
        "config.json": (bfl / "config.json").read_bytes(),
        "style_lora.safetensors": safetensors(bfl, "transformer.proj_out.lora_A.weight"),
        "README.md": b"a fine-tune",
    }
    opened = open_checkpoint("acme/one")
    assert (opened.layout, opened.revision) == ("bfl", COMMIT)
    assert set(hub.asked) == {f"flux1-dev.{suffix}", "config.json"}
    for part, folder in (("vae", "vae/"), ("clip", "text_encoder/"), ("t5", "text_encoder_2/")):
        with pytest.raises(CheckpointError, match=f"{folder}.*acme/one has none: copy"):
            opened.part(part)


def test_a_whole_repository_in_black_forest_labs_layout(hub: Hub, bfl: Path) -> None:
    hub.files = files_of(bfl)
    opened = open_checkpoint("acme/one")
    assert set(hub.asked) == hub.files.keys()
    assert opened.t5.num_layers == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"flux1-Q4.gguf": b"GGUF"}, r"GGUF files \(flux1-Q4.gguf\)"),
        ({"flux.ckpt": b"PK"}, "pickled files"),
        ({"README.md": b""}, "neither model_index.json nor"),
        ({f"lora{n}.safetensors": b"" for n in range(40)}, "a collection of 40 weight files"),
        ({"a.safetensors": b"no header at all"}, "named as safetensors and is none"),
    ],
)
def test_repositories_without_a_transformer(hub: Hub, files: dict[str, bytes], words: str) -> None:
    hub.files = files
    with pytest.raises(CheckpointError, match=words):
        download("acme/none")
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet.input_blocks.0.0.weight", "a checkpoint of Stable Diffusion"),
        ("transformer.proj_out.lora_A.weight", "a LoRA"),
        ("module.double_blocks.0.img_mod.lin.weight", "the prefix 'module.'"),
        ("decoder.conv_in.weight", "of no known kind"),
    ],
)
def test_weights_of_others_are_not_fetched(hub: Hub, tmp_path: Path, name: str, words: str) -> None:
    hub.files = {"model.safetensors": safetensors(tmp_path, name)}
    message = refusal("acme/other")
    assert "model.safetensors" in message
    assert words in message
    assert not hub.asked


def test_several_transformers_are_named(hub: Hub, bfl: Path) -> None:
    body = (bfl / "flux1.safetensors").read_bytes()
    hub.files = {"dev.safetensors": body, "schnell.safetensors": body}
    message = refusal("acme/two")
    assert "several transformers (dev.safetensors, schnell.safetensors)" in message
    assert not hub.asked


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXL"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "Flux2Pipeline"),
        ("transformer/config.json", {"quantization_config": {"load_in_4bit": True}}, "quantized"),
        (
            "text_encoder_2/config.json",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "text_encoder_2/config.json of acme/flux .* by bitsandbytes",
        ),
    ],
)
def test_configs_refuse_before_weights_are_fetched(
    hub: Hub, source: Path, file: str, change: dict[str, Any], words: str
) -> None:
    hub.files = files_of(source)
    hub.files[file] = json.dumps(json.loads(hub.files[file]) | change).encode()
    with pytest.raises(CheckpointError, match=words):
        download("acme/flux")
    assert not any(name.endswith(".safetensors") for name in hub.asked)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "accept its licence"),
        (404, "RepoNotFound", "neither a local path nor a hub repository"),
        (404, "RevisionNotFound", "has no revision v9"),
        (503, "", "answered with the error 503"),
        (429, "", "answered with the error 429"),
    ],
)
def test_answers_of_the_hub(hub: Hub, status: int, code: str, words: str) -> None:
    hub.status = lambda path: (status, code)
    assert words in refusal("acme/flux@v9")


def test_a_gate_before_the_files(hub: Hub, source: Path) -> None:
    """The names of a gated repository are for all, its files are not."""
    hub.files = files_of(source)
    hub.status = lambda path: (403, "GatedRepo") if "/resolve/" in path else None
    assert "is gated: accept its licence on the hub" in refusal("acme/flux")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x.incomplete")


def no_quota(*_: object, **__: object) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def no_space_in_native_code(*_: object, **__: object) -> None:
    raise RuntimeError(f"I/O error: No space left on device (os error 28) for {TOKEN}")


def no_space_behind(*_: object, **__: object) -> None:
    try:
        no_space()
    except OSError as error:
        raise ValueError("writing failed") from error


def read_only(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "/cache/blobs")


def reset(*_: object, **__: object) -> None:
    raise ConnectionResetError(errno.ECONNRESET, f"Connection reset, {TOKEN}")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (no_space, "is full"),
        (no_quota, "is full"),
        (no_space_in_native_code, "is full"),
        (no_space_behind, "is full"),
        (read_only, "cannot be written"),
        (reset, "the hub could not be reached"),
    ],
)
def test_what_a_failure_is_called(
    hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, words: str
) -> None:
    hub.files = files_of(source)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failure)
    message = refusal("acme/flux")
    assert words in message
    assert ("could not be reached" in message) == (failure is reset)


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub could not be reached, as HF_HUB_OFFLINE is set" in refusal("acme/flux")
