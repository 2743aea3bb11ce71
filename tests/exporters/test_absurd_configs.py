"""Sizes in a text encoder's config.json that no network has: refused before one is made of them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from exporters.checkpoint.text_configs import text_config
from fluxdeploy.errors import CheckpointError

T5 = {"model_type": "t5", "num_layers": 2}
CLIP = {"model_type": "clip_text_model"}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("t5", "num_layers", 10**9),
        ("t5", "num_decoder_layers", 10**9),
        ("t5", "num_heads", 10**12),
        ("t5", "d_kv", 2**63),
        ("t5", "d_kv", -1),
        ("t5", "d_ff", 1e308),
        ("t5", "vocab_size", 10**30),
        ("t5", "relative_attention_num_buckets", 0),
        ("clip", "num_hidden_layers", 10**9),
        ("clip", "num_attention_heads", 2**40),
        ("clip", "intermediate_size", -(10**18)),
        ("clip", "max_position_embeddings", 10**12),
    ],
)
def test_a_size_out_of_bounds_is_named(name: str, key: str, value: float) -> None:
    config: dict[str, Any] = {**(T5 if name == "t5" else CLIP), key: value}
    with pytest.raises(CheckpointError) as caught:
        text_config(name, {}, config)
    assert f"{name} text encoder's config.json says {key} {value!r}; 1 to" in str(caught.value)


@pytest.mark.parametrize("value", [[], {}, None, 7, "rel", ["relu"]])
def test_an_activation_that_is_none_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"names the activation|is not valid"):
        text_config("t5", {}, {**T5, "dense_act_fn": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_labels", 10**9), ("id2label", "x"), ("dropout_rate", 5), ("dtype", "float7")],
)
def test_what_is_of_other_uses_is_not_looked_at(key: str, value: object) -> None:
    # What follows is the lack of tensors.
    with pytest.raises(CheckpointError, match=r"tensor shared\.weight is missing"):
        text_config("t5", {}, {**T5, key: value})
