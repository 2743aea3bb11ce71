"""The text encoders: `clip` for the pooled embedding, `t5` for the tokens."""

from __future__ import annotations

import copy

import torch
from transformers import CLIPTextConfig, T5Config

from exporters.components.activations import clip_bytes, t5_bytes
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import WEIGHTS_ONLY, Component
from exporters.components.pieces import ComputeType, floats, make_piece, token_ids, value_of
from exporters.models import text_encoders

__all__ = ["CLIP", "T5"]


def _clip_chain(config: CLIPTextConfig, compute: ComputeType) -> Chain:
    """CLIP's text encoder up to the pooled embedding."""
    config = copy.deepcopy(config)
    ids = token_ids("B", config.max_position_embeddings)
    hidden = Value(compute.dtype, (*ids.shape, config.hidden_size))
    mask = Value(torch.float32, (config.max_position_embeddings,) * 2)
    embed = make_piece(lambda: text_encoders.ClipEmbedding(config), compute, value_of(ids))
    layer = make_piece(lambda: text_encoders.ClipLayer(config), compute, hidden, mask)
    pool = make_piece(lambda: text_encoders.ClipPooling(config), compute, hidden, value_of(ids))
    n = config.num_hidden_layers
    stages = [
        Stage(embed, ("input_ids",), ("hidden.0", "mask"), "text_model."),
        *(
            Stage(
                layer,
                (f"hidden.{i}", "mask"),
                (f"hidden.{i + 1}",),
                f"text_model.encoder.layers.{i}.",
            )
            for i in range(n)
        ),
        Stage(pool, (f"hidden.{n}", "input_ids"), ("pooled_embeddings",), "text_model."),
    ]
    outputs = (floats("pooled_embeddings", "B", config.hidden_size),)
    return Chain("clip", (ids,), outputs, tuple(stages))


def _t5_chain(config: T5Config, compute: ComputeType) -> Chain:
    """T5's encoder."""
    config = copy.deepcopy(config)
    ids = token_ids("B", "S")
    hidden = Value(compute.dtype, ("B", "S", config.d_model))
    bias = Value(torch.float32, (1, config.num_heads, "S", "S"))
    embed = make_piece(lambda: text_encoders.T5Embedding(config), compute, value_of(ids))
    position = make_piece(lambda: text_encoders.T5PositionBias(config), compute, value_of(ids))
    layer = make_piece(lambda: text_encoders.T5Layer(config), compute, hidden, bias)
    norm = make_piece(lambda: text_encoders.T5FinalNorm(config), compute, hidden)
    n = config.num_layers
    stages = [
        Stage(embed, ("input_ids",), ("hidden.0",)),
        Stage(
            position, ("input_ids",), ("position_bias",), "encoder.block.0.layer.0.SelfAttention."
        ),
        *(
            Stage(
                layer,
                (f"hidden.{i}", "position_bias"),
                (f"hidden.{i + 1}",),
                f"encoder.block.{i}.",
            )
            for i in range(n)
        ),
        Stage(norm, (f"hidden.{n}",), ("text_embeddings",), "encoder."),
    ]
    outputs = (floats("text_embeddings", "B", "S", config.d_model),)
    return Chain("t5", (ids,), outputs, tuple(stages))


CLIP = Component(
    name="clip",
    part="clip",
    chain=lambda networks, compute: _clip_chain(networks.clip, compute),
    activations=clip_bytes,
    turn="encode",
    vocabulary=lambda networks: networks.clip.vocab_size,
)

T5 = Component(
    name="t5",
    part="t5",
    chain=lambda networks, compute: _t5_chain(networks.t5, compute),
    activations=t5_bytes,
    turn="encode",
    precisions=WEIGHTS_ONLY,
    quantized=(
        r"encoder\.block\.\d+\.layer\."
        r"(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.(wi_0|wi_1|wo))"
    ),
    overflows_fp16=True,
    vocabulary=lambda networks: networks.t5.vocab_size,
)
