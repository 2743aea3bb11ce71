"""Checkpoints without training: what their weights are, and which sizes they have."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

pytest.importorskip("torch")

from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint import open_checkpoint
from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.synthetic.sparse_checkpoint import (
    FLUX_DEV,
    Sizes,
    declare_tensors,
    flux_of_depth,
    write_random_checkpoint,
)

SMALL = Sizes(
    TransformerConfig(64, 64, 128, 64, 512, 1, 1, 64, 64, True, (8, 28, 28), 10000.0),
    VaeConfig(16, (16, 16), 1, 4, 0.3611, 0.1159),
    CLIPTextConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    ),
    T5Config(vocab_size=1000, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(folder, SMALL)
    return folder


def test_random_weights_are_as_large_as_trained_ones(written: Path) -> None:
    checkpoint = open_checkpoint(str(written))
    assert checkpoint.transformer == SMALL.transformer
    for part in ("transformer", "vae", "clip", "t5"):
        for name, stored in checkpoint.part(part).weights.items():
            values = stored.read()
            if values.ndim > 1 and values.size > 500:
                gain = 0.1 if part == "transformer" and ".norm" in name else 1.0
                expected = gain / math.sqrt(math.prod(values.shape[1:]))
                assert values.std() == pytest.approx(expected, rel=0.15), name
            elif name.endswith(("norm_q.weight", "norm1.weight", "layer_norm.weight")):
                assert abs(values - 1).max() < 0.2, name
            elif name.endswith("bias"):
                assert 0 < abs(values).max() < 0.2, name


def test_random_weights_are_always_the_same(written: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "again", SMALL)
    files = sorted(path.relative_to(written) for path in written.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (written / file).read_bytes()


def test_a_reduced_depth_has_fluxs_width_and_little_around_it() -> None:
    sizes = flux_of_depth(2, 3)
    deeper = dataclasses.replace(sizes.transformer, double_blocks=19, single_blocks=38)
    assert deeper == FLUX_DEV.transformer
    assert (sizes.transformer.double_blocks, sizes.transformer.single_blocks) == (2, 3)
    count = {
        part: sum(math.prod(shape) for _, _, shape in declare_tensors(sizes, part))
        for part in ("transformer", "vae", "clip", "t5")
    }
    transformer = count.pop("transformer")
    assert sum(count.values()) < 0.01 * transformer
