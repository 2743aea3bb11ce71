"""The MM-DiT: `conditioner` and `transformer`, or the one-piece transformer of other tools."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from exporters.checkpoint.config import TransformerConfig
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.components.activations import conditioner_bytes, transformer_bytes
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import WEIGHTS_ONLY, Component, Networks
from exporters.components.pieces import COMPUTE_TYPES, ComputeType, floats, make_piece, value_of
from exporters.components.residuals import (
    KINDS,
    Kind,
    residual_count,
    residual_rows,
)
from exporters.models import mmdit
from fluxdeploy.bundle.boundary import SEEN
from fluxdeploy.bundle.manifest import Dimension, TensorSpec
from fluxdeploy.precision import PRECISIONS

__all__ = [
    "CONDITIONER",
    "ONE_PIECE",
    "TRANSFORMER",
    "Blocks",
    "ModulationNames",
    "double_stages",
    "embedding_stages",
    "join_stage",
    "modulation_stages",
    "seen_specs",
    "single_stages",
]

Blocks = TransformerConfig | ControlNetConfig
"""A network of these blocks."""


class ModulationNames:
    """Names of the values that carry each block's rows, in the order of the modulation tensor."""

    def __init__(self, config: Blocks) -> None:
        self.double = tuple(f"modulation.double.{i}" for i in range(config.double_blocks))
        self.single = tuple(f"modulation.single.{i}" for i in range(config.single_blocks))
        self.final = "modulation.final"
        # A ControlNet ends without an AdaLN.
        ends = (self.final,) if isinstance(config, TransformerConfig) else ()
        self.all = (*self.double, *self.single, *ends)


def modulation_stages(
    config: Blocks, compute: ComputeType, vector: tuple[Dimension, ...]
) -> list[Stage]:
    """`vector` [..., D] to the rows of each block."""
    names = ModulationNames(config)
    value = Value(torch.float32, (*vector, config.width))
    double = make_piece(lambda: mmdit.DoubleBlockModulation(config.width), compute, value)
    single = make_piece(lambda: mmdit.SingleBlockModulation(config.width), compute, value)
    final = make_piece(lambda: mmdit.FinalModulation(config.width), compute, value)
    stages = [
        *(
            Stage(double, ("vector",), (name,), f"transformer_blocks.{i}.")
            for i, name in enumerate(names.double)
        ),
        *(
            Stage(single, ("vector",), (name,), f"single_transformer_blocks.{i}.")
            for i, name in enumerate(names.single)
        ),
    ]
    if names.final in names.all:
        stages.append(Stage(final, ("vector",), (names.final,), "norm_out."))
    return stages


def embedding_stages(
    config: Blocks,
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


def double_stages(
    config: Blocks,
    compute: ComputeType,
    tables: tuple[str, str] = ("rope_cos", "rope_sin"),
    sees: bool = False,
) -> list[Stage]:
    """The double-stream blocks, from `hidden.0` and `context.0`; block i leaves number i + 1.

    Where they see pictures block i also reads `ip_keys.i` and `ip_values.i`.
    """
    names, width, dtype = ModulationNames(config), config.width, compute.residual
    hidden, context = (Value(dtype, ("B", tokens, width)) for tokens in ("L", "S"))
    table = Value(torch.float32, ("T", config.head_dim))
    double = make_piece(
        lambda: mmdit.DoubleBlock(width, config.head_dim, config.mlp_width),
        compute,
        hidden,
        context,
        Value(torch.float32, ("B", mmdit.DOUBLE_ROWS, width)),
        table,
        table,
        *([Value(compute.dtype, ("B", "V", width))] * len(SEEN) if sees else ()),
    )
    seen = SEEN if sees else ()
    return [
        Stage(
            double,
            (
                *(f"hidden.{i}", f"context.{i}", names.double[i], *tables),
                *(f"{name}.{i}" for name in seen),
            ),
            (f"hidden.{i + 1}", f"context.{i + 1}"),
            f"transformer_blocks.{i}.",
        )
        for i in range(config.double_blocks)
    ]


def join_stage(config: Blocks, compute: ComputeType) -> Stage:
    """What the double-stream blocks leave, as the `joint.0` of the single-stream ones."""
    n = config.double_blocks
    hidden, context = (Value(compute.residual, ("B", d, config.width)) for d in ("L", "S"))
    join = make_piece(mmdit.JoinStreams, compute, hidden, context)
    return Stage(join, (f"hidden.{n}", f"context.{n}"), ("joint.0",))


def single_stages(
    config: Blocks,
    compute: ComputeType,
    tables: tuple[str, str] = ("rope_cos", "rope_sin"),
) -> list[Stage]:
    """The single-stream blocks, from `joint.0`; block i leaves `joint.i + 1`."""
    names, width = ModulationNames(config), config.width
    table = Value(torch.float32, ("T", config.head_dim))
    single = make_piece(
        lambda: mmdit.SingleBlock(width, config.head_dim, config.mlp_width),
        compute,
        Value(compute.residual, ("B", "T", width)),
        Value(torch.float32, ("B", mmdit.SINGLE_ROWS, width)),
        table,
        table,
    )
    return [
        Stage(
            single,
            (f"joint.{i}", names.single[i], *tables),
            (f"joint.{i + 1}",),
            f"single_transformer_blocks.{i}.",
        )
        for i in range(config.single_blocks)
    ]


def _with_residuals(
    config: TransformerConfig,
    compute: ComputeType,
    controlnets: Sequence[ControlNetConfig],
    kind: Kind,
    blocks: list[Stage],
) -> list[Stage]:
    """Blocks of one kind, each followed by what ControlNets add to the image's tokens."""
    count = residual_count(controlnets, kind)
    if not count:
        return blocks
    width, dtype = config.width, compute.residual
    residuals = Value(torch.float32, (count, "B", "L", width))
    double = kind == "double"
    stream = Value(dtype, ("B", "L" if double else "T", width))
    reads = () if double else (Value(dtype, ("B", "S", width)),)
    make = mmdit.AddResidual if double else mmdit.AddImageResidual
    adds = [
        make_piece(functools.partial(make, row), compute, stream, *reads, residuals)
        for row in range(count)
    ]
    stages = []
    for stage, row in zip(blocks, residual_rows(controlnets, kind, len(blocks)), strict=True):
        end, *others = stage.writes
        before = f"{end}.before"
        names = (before, *(() if double else ("context.0",)), f"{kind}_residuals")
        stages += [
            replace(stage, writes=(before, *others)),
            # It has no weights: what stands for their place makes its nodes' names its own.
            Stage(adds[row], names, (end,), f"{end}."),
        ]
    return stages


def seen_specs(config: TransformerConfig, tokens: Dimension = "V") -> tuple[TensorSpec, ...]:
    """Keys and values of all blocks, of pictures with so many tokens in all."""
    shape = (config.double_blocks, "B", tokens, config.width)
    return tuple(floats(name, *shape) for name in SEEN)


def _seen_stage(specs: Sequence[TensorSpec], compute: ComputeType) -> Stage:
    """Each block's keys and values of those of all."""
    take = make_piece(
        lambda: mmdit.TakeSeen(compute.dtype), compute, *(value_of(spec) for spec in specs)
    )
    writes = (f"{spec.name}.{i}" for spec in specs for i in range(int(spec.shape[0])))
    return Stage(take, tuple(spec.name for spec in specs), tuple(writes))


def _block_stages(
    config: TransformerConfig,
    compute: ComputeType,
    output: str,
    controlnets: Sequence[ControlNetConfig] = (),
    sees: bool = False,
) -> list[Stage]:
    """From `hidden`, `context.0`, the blocks' rows and the RoPE tables to the velocity."""
    project = make_piece(
        lambda: mmdit.OutputProjection(config.width, config.out_channels),
        compute,
        Value(compute.residual, ("B", "T", config.width)),
        Value(compute.residual, ("B", "S", config.width)),
        Value(torch.float32, ("B", mmdit.FINAL_ROWS, config.width)),
    )
    double = double_stages(config, compute, sees=sees)
    single = single_stages(config, compute)
    ends = (f"joint.{config.single_blocks}", "context.0", ModulationNames(config).final)
    return [
        *_with_residuals(config, compute, controlnets, "double", double),
        join_stage(config, compute),
        *_with_residuals(config, compute, controlnets, "single", single),
        Stage(project, ends, (output,)),
    ]


def _transformer_chain(networks: Networks, compute: ComputeType) -> Chain:
    """The part of the MM-DiT that runs every step."""
    config, controlnets = networks.transformer, networks.controlnets
    seen = () if networks.ip_adapter is None else seen_specs(config)
    width, table = config.width, ("T", config.head_dim)
    counts = {kind: residual_count(controlnets, kind) for kind in KINDS}
    inputs = (
        floats("hidden_states", "B", "L", config.in_channels),
        floats("context", "B", "S", width),
        floats("modulation", "B", config.modulation_rows, width),
        floats("rope_cos", *table),
        floats("rope_sin", *table),
        *(
            floats(f"{kind}_residuals", count, "B", "L", width)
            for kind, count in counts.items()
            if count
        ),
        *seen,
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
            ("hidden.0", "context.0", *ModulationNames(config).all),
        ),
        *([_seen_stage(seen, compute)] if seen else ()),
        *_block_stages(config, compute, "velocity", controlnets, bool(seen)),
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
        *embedding_stages(
            config, compute, text, pooled, timestep, guidance, "context", schedule=True
        ),
        *modulation_stages(config, compute, ("N", "B")),
        Stage(pack, ModulationNames(config).all, ("modulation",)),
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
        *embedding_stages(
            config, compute, text, pooled, timestep, guidance, "projected", schedule=False
        ),
        Stage(tables, ("img_ids", "txt_ids"), ("rope_cos", "rope_sin")),
        *modulation_stages(config, compute, ("B",)),
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
    chain=lambda networks, compute: _transformer_chain(networks, compute),
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
