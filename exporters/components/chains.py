"""Each component of a bundle as a chain of stages: the contract of docs/components.md, in code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.components.chain import Chain, Piece, Stage, Value
from exporters.models import mmdit, text_encoders, vae
from fluxdeploy.bundle.manifest import Dimension, TensorSpec

__all__ = [
    "PRECISIONS",
    "Precision",
    "clip_chain",
    "conditioner_chain",
    "one_piece_chain",
    "t5_chain",
    "transformer_chain",
    "vae_decoder_chain",
    "vae_encoder_chain",
]

F32 = torch.float32


@dataclass(frozen=True)
class Precision:
    """Types inside a graph: of the linears and convolutions, and of the residual stream."""

    name: str
    compute: torch.dtype
    residual: torch.dtype


PRECISIONS = {
    "fp32": Precision("fp32", F32, F32),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
    # FLUX.1's residual stream leaves FP16's range.
    "fp16": Precision("fp16", torch.float16, F32),
}


def _float(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _ids(*shape: Dimension) -> TensorSpec:
    return TensorSpec("input_ids", "int32", shape)


def _value(spec: TensorSpec) -> Value:
    return Value(torch.int32 if spec.dtype == "int32" else F32, spec.shape)


def _piece(build: Callable[[], nn.Module], precision: Precision, *inputs: Value) -> Piece:
    with torch.device("meta"):
        return Piece(build().to(precision.compute).eval(), inputs)


class _ModulationNames:
    """Names of the values that carry each block's rows, in the order of the modulation tensor."""

    def __init__(self, config: TransformerConfig) -> None:
        self.double = tuple(f"modulation.double.{i}" for i in range(config.double_blocks))
        self.single = tuple(f"modulation.single.{i}" for i in range(config.single_blocks))
        self.final = "modulation.final"
        self.all = (*self.double, *self.single, self.final)


def _modulation_stages(
    config: TransformerConfig, precision: Precision, vector: tuple[Dimension, ...]
) -> list[Stage]:
    """`vector` [..., D] to the rows of each block."""
    names = _ModulationNames(config)
    value = Value(F32, (*vector, config.width))
    double = _piece(lambda: mmdit.DoubleBlockModulation(config.width), precision, value)
    single = _piece(lambda: mmdit.SingleBlockModulation(config.width), precision, value)
    final = _piece(lambda: mmdit.FinalModulation(config.width), precision, value)
    return [
        *(
            Stage(double, ("vector",), (name,), f"transformer_blocks.{i}.")
            for i, name in enumerate(names.double)
        ),
        *(
            Stage(single, ("vector",), (name,), f"single_transformer_blocks.{i}.")
            for i, name in enumerate(names.single)
        ),
        Stage(final, ("vector",), (names.final,), "norm_out."),
    ]


def _embedding_stages(
    config: TransformerConfig,
    precision: Precision,
    text: TensorSpec,
    pooled: TensorSpec,
    timestep: TensorSpec,
    guidance: TensorSpec,
    context: str,
    schedule: bool,
) -> list[Stage]:
    """Text projection and the vector that drives the AdaLN linears."""
    conditions = (pooled, timestep, *((guidance,) if config.guidance_embedding else ()))
    project = _piece(
        lambda: mmdit.TextProjection(config.text_width, config.width), precision, _value(text)
    )
    embed = _piece(
        lambda: mmdit.TimestepEmbedding(
            config.pooled_width, config.width, config.guidance_embedding, schedule
        ),
        precision,
        *(_value(spec) for spec in conditions),
    )
    return [
        Stage(project, (text.name,), (context,)),
        Stage(embed, tuple(spec.name for spec in conditions), ("vector",)),
    ]


def _block_stages(config: TransformerConfig, precision: Precision, output: str) -> list[Stage]:
    """From `hidden`, `context.0`, the blocks' rows and the RoPE tables to the velocity."""
    names = _ModulationNames(config)
    width, dtype = config.width, precision.residual
    hidden = Value(dtype, ("B", "L", width))
    context = Value(dtype, ("B", "S", width))
    joint = Value(dtype, ("B", "T", width))
    table = Value(F32, ("T", config.head_dim))
    tables = ("rope_cos", "rope_sin")

    def rows(count: int) -> Value:
        return Value(F32, ("B", count, width))

    double = _piece(
        lambda: mmdit.DoubleBlock(width, config.head_dim, config.mlp_width),
        precision,
        hidden,
        context,
        rows(mmdit.DOUBLE_ROWS),
        table,
        table,
    )
    single = _piece(
        lambda: mmdit.SingleBlock(width, config.head_dim, config.mlp_width),
        precision,
        joint,
        rows(mmdit.SINGLE_ROWS),
        table,
        table,
    )
    join = _piece(mmdit.JoinStreams, precision, hidden, context)
    project = _piece(
        lambda: mmdit.OutputProjection(width, config.out_channels),
        precision,
        joint,
        context,
        rows(mmdit.FINAL_ROWS),
    )
    n, m = config.double_blocks, config.single_blocks
    return [
        *(
            Stage(
                double,
                (f"hidden.{i}", f"context.{i}", names.double[i], *tables),
                (f"hidden.{i + 1}", f"context.{i + 1}"),
                f"transformer_blocks.{i}.",
            )
            for i in range(n)
        ),
        Stage(join, (f"hidden.{n}", f"context.{n}"), ("joint.0",)),
        *(
            Stage(
                single,
                (f"joint.{i}", names.single[i], *tables),
                (f"joint.{i + 1}",),
                f"single_transformer_blocks.{i}.",
            )
            for i in range(m)
        ),
        Stage(project, (f"joint.{m}", "context.0", names.final), (output,)),
    ]


def transformer_chain(config: TransformerConfig, precision: Precision) -> Chain:
    """The part of the MM-DiT that runs every step."""
    width, table = config.width, ("T", config.head_dim)
    inputs = (
        _float("hidden_states", "B", "L", config.in_channels),
        _float("context", "B", "S", width),
        _float("modulation", "B", config.modulation_rows, width),
        _float("rope_cos", *table),
        _float("rope_sin", *table),
    )
    project = _piece(
        lambda: mmdit.ImageProjection(
            config.in_channels,
            width,
            config.double_blocks,
            config.single_blocks,
            precision.residual,
        ),
        precision,
        *(_value(spec) for spec in inputs[:3]),
    )
    stages = [
        Stage(
            project,
            ("hidden_states", "context", "modulation"),
            ("hidden.0", "context.0", *_ModulationNames(config).all),
        ),
        *_block_stages(config, precision, "velocity"),
    ]
    outputs = (_float("velocity", "B", "L", config.out_channels),)
    return Chain("transformer", inputs, outputs, tuple(stages))


def conditioner_chain(config: TransformerConfig, precision: Precision) -> Chain:
    """The part of the MM-DiT that depends on prompt and schedule alone: once a picture."""
    text = _float("text_embeddings", "B", "S", config.text_width)
    pooled = _float("pooled_embeddings", "B", config.pooled_width)
    timestep = _float("timestep", "N")
    guidance = _float("guidance", "B")
    rows = [
        Value(F32, ("N", "B", count, config.width))
        for count in [mmdit.DOUBLE_ROWS] * config.double_blocks
        + [mmdit.SINGLE_ROWS] * config.single_blocks
        + [mmdit.FINAL_ROWS]
    ]
    pack = _piece(mmdit.PackModulation, precision, *rows)
    stages = [
        *_embedding_stages(
            config, precision, text, pooled, timestep, guidance, "context", schedule=True
        ),
        *_modulation_stages(config, precision, ("N", "B")),
        Stage(pack, _ModulationNames(config).all, ("modulation",)),
    ]
    return Chain(
        "conditioner",
        (text, pooled, timestep, *((guidance,) if config.guidance_embedding else ())),
        (
            _float("context", "B", "S", config.width),
            _float("modulation", "N", "B", config.modulation_rows, config.width),
        ),
        tuple(stages),
    )


def one_piece_chain(config: TransformerConfig, precision: Precision) -> Chain:
    """The whole MM-DiT under the tensor names of the published FLUX.1 ONNX files."""
    hidden = _float("hidden_states", "B", "L", config.in_channels)
    text = _float("encoder_hidden_states", "B", "S", config.text_width)
    pooled = _float("pooled_projections", "B", config.pooled_width)
    timestep = _float("timestep", "B")
    axes = len(config.axes_dims)
    img_ids, txt_ids = _float("img_ids", "L", axes), _float("txt_ids", "S", axes)
    guidance = _float("guidance", "B")
    tables = _piece(
        lambda: mmdit.RopeTables(config.axes_dims, config.theta),
        PRECISIONS["fp32"],
        _value(img_ids),
        _value(txt_ids),
    )
    project = _piece(
        lambda: mmdit.OnePieceProjection(config.in_channels, config.width, precision.residual),
        precision,
        _value(hidden),
        Value(F32, ("B", "S", config.width)),
    )
    stages = [
        *_embedding_stages(
            config, precision, text, pooled, timestep, guidance, "projected", schedule=False
        ),
        Stage(tables, ("img_ids", "txt_ids"), ("rope_cos", "rope_sin")),
        *_modulation_stages(config, precision, ("B",)),
        Stage(project, ("hidden_states", "projected"), ("hidden.0", "context.0")),
        *_block_stages(config, precision, "latent"),
    ]
    inputs = (hidden, text, pooled, timestep, img_ids, txt_ids)
    return Chain(
        "transformer",
        inputs + ((guidance,) if config.guidance_embedding else ()),
        (_float("latent", "B", "L", config.out_channels),),
        tuple(stages),
    )


def clip_chain(config: CLIPTextConfig, precision: Precision) -> Chain:
    """CLIP's text encoder up to the pooled embedding."""
    config = copy.deepcopy(config)
    ids = _ids("B", config.max_position_embeddings)
    hidden = Value(precision.compute, (*ids.shape, config.hidden_size))
    mask = Value(F32, (config.max_position_embeddings,) * 2)
    embed = _piece(lambda: text_encoders.ClipEmbedding(config), precision, _value(ids))
    layer = _piece(lambda: text_encoders.ClipLayer(config), precision, hidden, mask)
    pool = _piece(lambda: text_encoders.ClipPooling(config), precision, hidden, _value(ids))
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
    outputs = (_float("pooled_embeddings", "B", config.hidden_size),)
    return Chain("clip", (ids,), outputs, tuple(stages))


def t5_chain(config: T5Config, precision: Precision) -> Chain:
    """T5's encoder."""
    config = copy.deepcopy(config)
    ids = _ids("B", "S")
    hidden = Value(precision.compute, ("B", "S", config.d_model))
    bias = Value(F32, (1, config.num_heads, "S", "S"))
    embed = _piece(lambda: text_encoders.T5Embedding(config), precision, _value(ids))
    position = _piece(lambda: text_encoders.T5PositionBias(config), precision, _value(ids))
    layer = _piece(lambda: text_encoders.T5Layer(config), precision, hidden, bias)
    norm = _piece(lambda: text_encoders.T5FinalNorm(config), precision, hidden)
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
    outputs = (_float("text_embeddings", "B", "S", config.d_model),)
    return Chain("t5", (ids,), outputs, tuple(stages))


def vae_decoder_chain(config: VaeConfig, precision: Precision) -> Chain:
    """The VAE's decoder."""
    latents = _float("latents", "B", config.latent_channels, "h", "w")
    piece = _piece(
        lambda: vae.VaeDecoder(
            config.latent_channels, config.channels, config.layers, config.groups
        ),
        precision,
        _value(latents),
    )
    stage = Stage(piece, ("latents",), ("images",), "decoder.")
    return Chain("vae_decoder", (latents,), (_float("images", "B", 3, "H", "W"),), (stage,))


def vae_encoder_chain(config: VaeConfig, precision: Precision) -> Chain:
    """The VAE's encoder, up to mean and log-variance: the host samples."""
    images = _float("images", "B", 3, "H", "W")
    piece = _piece(
        lambda: vae.VaeEncoder(
            config.latent_channels, config.channels, config.layers, config.groups
        ),
        precision,
        _value(images),
    )
    outputs = tuple(
        _float(name, "B", config.latent_channels, "h", "w") for name in ("mean", "logvar")
    )
    stage = Stage(piece, ("images",), ("mean", "logvar"), "encoder.")
    return Chain("vae_encoder", (images,), outputs, (stage,))
