"""IP-Adapters are recognised by their tensors, and held against transformer and image encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fluxdeploy.build.checkpoint import find_checkpoint, hash_checkpoint
from fluxdeploy.cli import main
from fluxdeploy.errors import CheckpointError
from fluxdeploy.progress import Progress

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

Tensors = dict[str, Any]
K = "double_blocks.1.processor.ip_adapter_double_stream_k_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IP-Adapter for `dev`, with its image encoder."""
    from tests.support.checkpoints import SHAPES, make_ip_adapter

    return make_ip_adapter(tmp_path_factory.mktemp("adapter"), SHAPES["dev"])


@pytest.fixture
def dev(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("dev"))


@pytest.fixture
def rewritten(folder: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Tensors]], Path]:
    """The adapter's file with other tensors, its encoder beside it."""
    from safetensors.torch import load_file, save_file

    def make(change: Callable[[Tensors], Tensors]) -> Path:
        (tmp_path / "image_encoder").symlink_to(folder / "image_encoder")
        changed = change(load_file(folder / "ip_adapter.safetensors"))
        save_file(
            {name: tensor.contiguous() for name, tensor in changed.items()},
            tmp_path / "a.safetensors",
        )
        return tmp_path / "a.safetensors"

    return make


def test_an_adapter_joins_and_leaves_the_checkpoint_what_it_is(dev: str, folder: Path) -> None:
    plain, opened = (find_checkpoint(dev, ip_adapter=each) for each in (None, folder))
    assert opened.ip_adapter is not None
    assert (opened.ip_adapter.tokens, opened.ip_adapter.token_width) == (4, 48)
    assert opened.parts_beside == ("ip_adapter", "ip_adapter_encoder")
    with Progress(quiet=True) as progress:
        digests = {hash_checkpoint(each, progress).digest for each in (plain, opened)}
    assert len(digests) == 1


def test_the_names_of_both_kinds_of_files_are_read(
    dev: str, rewritten: Callable[..., Path]
) -> None:
    def renamed(tensors: Tensors) -> Tensors:
        pairs = (
            ("ip_adapter_proj_model.", "image_proj."),
            ("double_blocks.", "ip_adapter."),
            ("processor.ip_adapter_double_stream_k_proj", "to_k_ip"),
            ("processor.ip_adapter_double_stream_v_proj", "to_v_ip"),
        )
        for old, new in pairs:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    opened = find_checkpoint(dev, ip_adapter=rewritten(renamed))
    assert "ip_adapter.1.to_v_ip.bias" in opened.part("ip_adapter").weights


def test_sixteen_tokens_are_told_by_the_norm(dev: str, rewritten: Callable[..., Path]) -> None:
    def wider(tensors: Tensors) -> Tensors:
        name = "ip_adapter_proj_model.proj"
        more = {f"{name}.weight": torch.randn(768, 28), f"{name}.bias": torch.randn(768)}
        return {**tensors, **more}

    opened = find_checkpoint(dev, ip_adapter=rewritten(wider))
    assert opened.ip_adapter is not None
    assert opened.ip_adapter.tokens == 16


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(names)}


def put(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def with_a_third_block(tensors: Tensors) -> Tensors:
    second = "double_blocks.1."
    more = {n.replace(second, "double_blocks.2."): t + 0 for n, t in tensors.items() if second in n}
    return {**tensors, **more}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(f"{K}.bias"), "has no tensor ip_adapter.1.to_k_ip.bias"),
        (without("ip_adapter_proj_model.norm.bias"), "has no tensor image_proj.norm.bias"),
        (without("ip_adapter_proj_model.norm"), "no tensor image_proj.norm.weight"),
        (without("double_blocks.1"), "double-stream blocks numbering 1, and the checkpoint 2"),
        (without("double_blocks.0"), "but not number 0"),
        (with_a_third_block, "blocks numbering 3, and the checkpoint 2"),
        (put("ip_adapter_proj_model.norm.weight", 32), "of 32"),
        (put("ip_adapter_proj_model.norm.weight", 36), "no whole number of tokens"),
        (put("image_proj.latents", 1, 8), "image_proj.latents .* is none that an IP-Adapter"),
        (put("image_proj.norm.weight", 48), "holds two IP-Adapters"),
        (lambda tensors: {"blocks.0.lora_A.weight": torch.ones(2, 2)}, "LoRA"),
        (lambda tensors: {"something": torch.ones(2)}, "is no IP-Adapter but something else"),
        (lambda tensors: {"decoder.conv_in.weight": torch.ones(2)}, "is no IP-Adapter"),
    ],
)
def test_a_file_that_is_none_or_incomplete_is_refused(
    change: Callable[[Tensors], Tensors], said: str, dev: str, rewritten: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(dev, ip_adapter=rewritten(change))


def test_what_was_made_for_another_transformer_is_refused(
    dev: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    from tests.support.checkpoints import SHAPES, make_ip_adapter

    kinds = {"heads": (3, "a width of 72"), "text_width": (40, "as wide as text, of 40")}
    for name, (value, said) in kinds.items():
        shape = replace(SHAPES["dev"], **{name: value})  # type: ignore[arg-type]
        other = make_ip_adapter(tmp_path / name, shape)
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(dev, ip_adapter=other)
    with pytest.raises(CheckpointError, match="is one for fill, and IP-Adapters go with"):
        find_checkpoint(str(checkpoint("fill")), ip_adapter=folder)


def test_paths_that_lead_to_none_say_what_is_there(dev: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter.bin").write_bytes(b"")
    many = tmp_path / "many"
    many.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(folder / "ip_adapter.safetensors", many / name)
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "holds no safetensors file"),
        (tmp_path / "adapter.bin", "is a pickle"),
        (many, "holds a.safetensors, b.safetensors"),
        (Path(dev), "is a whole checkpoint"),
        (many / "a.safetensors", "many/image_encoder does not exist"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(dev, ip_adapter=path)
    with pytest.raises(CheckpointError, match="is for an IP-Adapter, and there is none"):
        find_checkpoint(dev, image_encoder=folder / "image_encoder")


def test_two_adapters_are_refused() -> None:
    result = CliRunner().invoke(main, ["plan", "--ip-adapter", "a", "--ip-adapter", "b"])
    assert result.exit_code == 2
    assert "There are 2 IP-Adapters. A bundle has one" in result.stderr


def test_the_image_encoder_may_be_a_whole_clip(dev: str, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "image_encoder" / "model.safetensors")
    tensors |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((folder / "image_encoder" / "config.json").read_text())
    whole = {"model_type": "clip", "vision_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    opened = find_checkpoint(dev, ip_adapter=folder, image_encoder=tmp_path)
    assert opened.ip_adapter_encoder is not None
    assert opened.ip_adapter_encoder.projection == 28


@pytest.mark.parametrize(
    ("shape", "said"),
    [(None, "has no tensor visual_projection.weight"), ((20, 36), "of 28, and .* gives 20")],
)
def test_an_encoder_of_other_embeddings_is_refused(
    shape: tuple[int, int] | None, said: str, dev: str, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "image_encoder" / "model.safetensors")
    del tensors["visual_projection.weight"]
    if shape is not None:
        tensors["visual_projection.weight"] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "image_encoder" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(dev, ip_adapter=folder, image_encoder=tmp_path)


def test_a_transformer_that_sees_is_measured_as_the_plain_one(dev: str, folder: Path) -> None:
    from exporters.calibrate.trajectory import Calibration, start_samples, take_step
    from exporters.components.registry import COMPONENTS

    calibration = Calibration(("a fox",), 0, ((32, 48),), 2, 3.5)
    ends = []
    for adapter in (None, folder):
        opened = find_checkpoint(dev, ip_adapter=adapter)
        (sample,) = start_samples(opened, calibration, Progress(quiet=True))
        assert ("ip_keys" in sample.inputs(0)) == (adapter is not None)
        take_step(*COMPONENTS["transformer"].source(opened, "fp32"), [sample], 0)
        ends.append(sample.latents)
    np.testing.assert_array_equal(*ends)


def test_what_is_seen_is_none_of_the_attentions_that_are_quantized(dev: str, folder: Path) -> None:
    from exporters.components.registry import COMPONENTS
    from exporters.components.run import ReplaceAttention, run_samples

    replaced: list[tuple[int, ...]] = []

    def attend(query: Any, key: Any, value: Any, shares: Any) -> Any:
        replaced.append(tuple(shares.shape))
        return shares @ value

    opened = find_checkpoint(dev, ip_adapter=folder)
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    # As many tokens of a picture as of the one that is drawn.
    sizes: dict[Any, int] = {"B": 1, "S": 8, "L": 8, "T": 16, "V": 8}
    inputs = {
        spec.name: np.ones([sizes.get(d, d) for d in spec.shape], np.float32)  # type: ignore[arg-type]
        for spec in chain.inputs
    }
    with ReplaceAttention(attend):
        run_samples(chain, weights, [inputs])
    assert replaced == [(1, 4, 16, 16)] * 4
