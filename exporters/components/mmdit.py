"""The MM-DiT: `conditioner` and `transformer`, or the one-piece transformer of other tools."""

from __future__ import annotations

from dataclasses import replace

import torch

from exporters.checkpoint.config import TransformerConfig
from exporters.components.activations import conditioner_bytes, transformer_bytes
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import WEIGHTS_ONLY, Component
from exporters.components.pieces import COMPUTE_TYPES, ComputeType, floats, make_piece, value_of
from exporters.models import mmdit
from fluxdeploy.bundle.manifest import Dimension, TensorSpec
from fluxdeploy.precision import PRECISIONS

__all__ = ["CONDITIONER", "ONE_PIECE", "TRANSFORMER"]


class _ModulationNames:
    """Names of the values that carry each block's rows, in the order of the modulation tensor."""

    def __init__(self, config: TransformerConfig) -> None:
        self.double = tuple(f"modulation.double.{i}" for i in range(config.double_blocks))
        self.single = tuple(f"modulation.single.{i}" for i in range(config.single_blocks))
        self.final = "modulation.final"
        self.all = (*self.double, *self.single, self.final)


def _modulation_stages(
    config: TransformerConfig, compute: ComputeType, vector: tuple[Dimension, ...]
) -> list[Stage]:
    """`vector` [..., D] to the rows of each block."""
    names = _ModulationNames(config)
    value = Value(torch.float32, (*vector, config.width))
    double = make_piece(lambda: mmdit.DoubleBlockModulation(config.width), compute, value)
    single = make_piece(lambda: mmdit.SingleBlockModulation(config.width), compute, value)
    final = make_piece(lambda: mmdit.FinalModulation(config.width), compute, value)
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
    compute: ComputeType,
    text: TensorSpec,
    pooled: TensorSpec,
    timestep: TensorSpec,
    guidance: TensorSpec,
    context: str,
    schedule: bool,
) -> list[Stage]:
    """Text projection and the vector that drives the AdaLN linears."""
    conditions = (pooled, timestep, *((guidance,) if config.guidance_embedding else ()))
    project = make_piece(
        lambda: mmdit.TextProjection(config.text_width, config.width), compute, value_of(text)
    )
    embed = make_piece(
        lambda: mmdit.TimestepEmbedding(
            config.pooled_width, config.width, config.guidance_embedding, schedule
        ),
        compute,
        *(value_of(spec) for spec in conditions),
    )
    return [
        Stage(project, (text.name,), (context,)),
        Stage(embed, tuple(spec.name for spec in conditions), ("vector",)),
    ]


def _block_stages(config: TransformerConfig, compute: ComputeType, output: str) -> list[Stage]:
    """From `hidden`, `context.0`, the blocks' rows and the RoPE tables to the velocity."""
    names = _ModulationNames(config)
    width, dtype = config.width, compute.residual
    hidden = Value(dtype, ("B", "L", width))
    context = Value(dtype, ("B", "S", width))
    joint = Value(dtype, ("B", "T", width))
    table = Value(torch.float32, ("T", config.head_dim))
    tables = ("rope_cos", "rope_sin")

    def rows(count: int) -> Value:
        return Value(torch.float32, ("B", count, width))

    double = make_piece(
        lambda: mmdit.DoubleBlock(width, config.head_dim, config.mlp_width),
        compute,
        hidden,
        context,
        rows(mmdit.DOUBLE_ROWS),
        table,
        table,
    )
    single = make_piece(
        lambda: mmdit.SingleBlock(width, config.head_dim, config.mlp_width),
        compute,
        joint,
        rows(mmdit.SINGLE_ROWS),
        table,
        table,
    )
    join = make_piece(mmdit.JoinStreams, compute, hidden, context)
    project = make_piece(
        lambda: mmdit.OutputProjection(width, config.out_channels),
        compute,
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


def _transformer_chain(config: TransformerConfig, compute: ComputeType) -> Chain:
    """The part of the MM-DiT that runs every step."""
    width, table = config.width, ("T", config.head_dim)
    inputs = (
        floats("hidden_states", "B", "L", config.in_channels),
        floats("context", "B", "S", width),
        floats("modulation", "B", config.modulation_rows, width),
        floats("rope_cos", *table),
        floats("rope_sin", *table),
    )
    project = make_piece(
        lambda: mmdit.ImageProjection(
            config.in_channels,
            width,
            config.double_blocks,
            config.single_blocks,
            compute.residual,
        ),
        compute,
        *(value_of(spec) for spec in inputs[:3]),
    )
    stages = [
        Stage(
            project,
            ("hidden_states", "context", "modulation"),
            ("hidden.0", "context.0", *_ModulationNames(config).all),
        ),
        *_block_stages(config, compute, "velocity"),
    ]
    outputs = (floats("velocity", "B", "L", config.out_channels),)
    return Chain("transformer", inputs, outputs, tuple(stages))


def _conditioner_chain(config: TransformerConfig, compute: ComputeType) -> Chain:
    """The part of the MM-DiT that depends on prompt and schedule alone: once a picture."""
    text = floats("text_embeddings", "B", "S", config.text_width)
    pooled = floats("pooled_embeddings", "B", config.pooled_width)
    timestep = floats("timestep", "N")
    guidance = floats("guidance", "B")
    rows = [
        Value(torch.float32, ("N", "B", count, config.width))
        for count in [mmdit.DOUBLE_ROWS] * config.double_blocks
        + [mmdit.SINGLE_ROWS] * config.single_blocks
        + [mmdit.FINAL_ROWS]
    ]
    pack = make_piece(mmdit.PackModulation, compute, *rows)
    stages = [
        *_embedding_stages(
            config, compute, text, pooled, timestep, guidance, "context", schedule=True
        ),
        *_modulation_stages(config, compute, ("N", "B")),
        Stage(pack, _ModulationNames(config).all, ("modulation",)),
    ]
    return Chain(
        "conditioner",
        (text, pooled, timestep, *((guidance,) if config.guidance_embedding else ())),
        (
            floats("context", "B", "S", config.width),
            floats("modulation", "N", "B", config.modulation_rows, config.width),
        ),
        tuple(stages),
    )


def _one_piece_chain(config: TransformerConfig, compute: ComputeType) -> Chain:
    """The whole MM-DiT under the tensor names of the published FLUX.1 ONNX files."""
    hidden = floats("hidden_states", "B", "L", config.in_channels)
    text = floats("encoder_hidden_states", "B", "S", config.text_width)
    pooled = floats("pooled_projections", "B", config.pooled_width)
    timestep = floats("timestep", "B")
    axes = len(config.axes_dims)
    img_ids, txt_ids = floats("img_ids", "L", axes), floats("txt_ids", "S", axes)
    guidance = floats("guidance", "B")
    tables = make_piece(
        lambda: mmdit.RopeTables(config.axes_dims, config.theta),
        COMPUTE_TYPES["fp32"],
        value_of(img_ids),
        value_of(txt_ids),
    )
    project = make_piece(
        lambda: mmdit.OnePieceProjection(config.in_channels, config.width, compute.residual),
        compute,
        value_of(hidden),
        Value(torch.float32, ("B", "S", config.width)),
    )
    stages = [
        *_embedding_stages(
            config, compute, text, pooled, timestep, guidance, "projected", schedule=False
        ),
        Stage(tables, ("img_ids", "txt_ids"), ("rope_cos", "rope_sin")),
        *_modulation_stages(config, compute, ("B",)),
        Stage(project, ("hidden_states", "projected"), ("hidden.0", "context.0")),
        *_block_stages(config, compute, "latent"),
    ]
    inputs = (hidden, text, pooled, timestep, img_ids, txt_ids)
    return Chain(
        "transformer",
        inputs + ((guidance,) if config.guidance_embedding else ()),
        (floats("latent", "B", "L", config.out_channels),),
        tuple(stages),
    )


_BLOCK_LINEARS = (
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)"
    r"|(ff|ff_context)\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)

TRANSFORMER = Component(
    name="transformer",
    part="transformer",
    chain=lambda networks, compute: _transformer_chain(networks.transformer, compute),
    activations=transformer_bytes,
    turn="denoise",
    precisions=PRECISIONS,
    quantized=_BLOCK_LINEARS,
)

# Products with one vector a picture: only the weights' bytes are worth quantizing.
CONDITIONER = Component(
    name="conditioner",
    part="transformer",
    chain=lambda networks, compute: _conditioner_chain(networks.transformer, compute),
    activations=conditioner_bytes,
    turn="encode",
    precisions=WEIGHTS_ONLY,
    quantized=(
        r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear"
        r"|single_transformer_blocks\.\d+\.norm\.linear"
    ),
)

ONE_PIECE = replace(
    TRANSFORMER,
    chain=lambda networks, compute: _one_piece_chain(networks.transformer, compute),
)
"""Both as one, under the tensor names of the published FLUX.1 ONNX files."""
