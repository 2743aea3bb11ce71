"""ControlNets: the part that runs each step, and the parts that run once a picture.

`controlnet` and `controlnet_conditioner` are split as `transformer` and `conditioner` are;
`controlnet_encoder` is there where pixels, and no latents of the VAE, are what it takes. A second
ControlNet's are called `controlnet_2` and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from exporters.checkpoint.checkpoint import controlnet_name
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.components.activations import (
    controlnet_bytes,
    controlnet_conditioner_bytes,
    controlnet_encoder_bytes,
)
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import Component, Networks
from exporters.components.mmdit import (
    ModulationNames,
    double_stages,
    embedding_stages,
    join_stage,
    modulation_stages,
    single_stages,
)
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from exporters.components.residuals import KINDS, Kind
from exporters.models import controlnet, mmdit
from fluxdeploy.bundle.manifest import TensorSpec

__all__ = ["controlnet_components"]

_TABLES = ("rope_cos", "rope_sin")


def _step_chain(name: str, config: ControlNetConfig, compute: ComputeType) -> Chain:
    """The part that runs every step."""
    width, table = config.width, ("T", config.head_dim)
    inputs = (
        floats("hidden_states", "B", "L", config.in_channels),
        floats("control_latents", "B", "L", config.control_channels),
        floats("context", "B", "S", width),
        floats("modulation", "B", config.modulation_rows, width),
        floats("rope_cos", *table),
        floats("rope_sin", *table),
        *((floats("mode", "B", 1, width),) if config.modes else ()),
    )
    project = make_piece(
        lambda: controlnet.ControlProjection(
            (config.in_channels, config.control_channels),
            width,
            config.double_blocks,
            config.single_blocks,
            compute.residual,
        ),
        compute,
        *(value_of(spec) for spec in inputs[:4]),
    )
    text = "context.text" if config.modes else "context.0"
    names = ModulationNames(config).all
    stages = [
        Stage(project, tuple(spec.name for spec in inputs[:4]), ("hidden.0", text, *names)),
        *(_mode_stages(config, compute, text) if config.modes else ()),
    ]
    tables = ("mode_cos", "mode_sin") if config.modes else _TABLES
    stages += double_stages(config, compute, tables)
    if config.single_blocks:
        stages += [join_stage(config, compute), *single_stages(config, compute, tables)]
    outputs = []
    counts = zip(KINDS, (config.double_blocks, config.single_blocks), strict=True)
    for kind, count in counts:
        if count:
            stages += _residual_stages(config, compute, kind, count)
            outputs.append(floats(f"{kind}_residuals", count, "B", "L", width))
    return Chain(name, inputs, tuple(outputs), tuple(stages))


def _mode_stages(config: ControlNetConfig, compute: ComputeType, text: str) -> list[Stage]:
    """The embedding of the control's kind before the text, and a row of positions for it."""
    width = config.width
    context = Value(compute.residual, ("B", "S", width))
    mode = Value(torch.float32, ("B", 1, width))
    prepend = make_piece(controlnet.Prepend, compute, mode, context)
    table = Value(torch.float32, ("T", config.head_dim))
    repeat = make_piece(controlnet.RepeatFirst, compute, table)
    return [
        Stage(prepend, ("mode", text), ("context.0",)),
        *(
            Stage(repeat, (f"rope_{axis}",), (f"mode_{axis}",), f"mode_{axis}.")
            for axis in ("cos", "sin")
        ),
    ]


def _residual_stages(
    config: ControlNetConfig, compute: ComputeType, kind: Kind, count: int
) -> list[Stage]:
    """What each block of a kind leaves, projected, in one tensor."""
    width, dtype = config.width, compute.residual
    make: Callable[[int], nn.Module]
    if kind == "double":
        make, scope, stream = controlnet.Residual, "controlnet_blocks", "hidden"
        values: Sequence[Value] = (Value(dtype, ("B", "L", width)),)
        beside: tuple[str, ...] = ()
    else:
        make, scope, stream = controlnet.ImageResidual, "controlnet_single_blocks", "joint"
        values = (Value(dtype, ("B", "T", width)), Value(dtype, ("B", "S", width)))
        beside = ("context.0",)
    project = make_piece(functools.partial(make, width), compute, *values)
    residual = Value(torch.float32, ("B", "L", width))
    stack = make_piece(controlnet.StackResiduals, compute, *[residual] * count)
    names = tuple(f"{kind}_residual.{i}" for i in range(count))
    return [
        *(
            Stage(project, (f"{stream}.{i + 1}", *beside), (name,), f"{scope}.{i}.")
            for i, name in enumerate(names)
        ),
        Stage(stack, names, (f"{kind}_residuals",)),
    ]


def _conditioner_chain(name: str, config: ControlNetConfig, compute: ComputeType) -> Chain:
    """The part that depends on prompt, schedule and kind of control alone: once a picture."""
    text = floats("text_embeddings", "B", "S", config.text_width)
    pooled = floats("pooled_embeddings", "B", config.pooled_width)
    timestep = floats("timestep", "N")
    guidance = floats("guidance", "B")
    inputs = [text, pooled, timestep, *((guidance,) if config.guidance_embedding else ())]
    outputs = [
        floats("context", "B", "S", config.width),
        floats("modulation", "N", "B", config.modulation_rows, config.width),
    ]
    rows = [
        Value(torch.float32, ("N", "B", count, config.width))
        for count in [mmdit.DOUBLE_ROWS] * config.double_blocks
        + [mmdit.SINGLE_ROWS] * config.single_blocks
    ]
    pack = make_piece(mmdit.PackModulation, compute, *rows)
    stages = [
        *embedding_stages(
            config, compute, text, pooled, timestep, guidance, "context", schedule=True
        ),
        *modulation_stages(config, compute, ("N", "B")),
        Stage(pack, ModulationNames(config).all, ("modulation",)),
    ]
    if config.modes:
        mode = TensorSpec("control_mode", "int32", ("B", 1))
        inputs.append(mode)
        outputs.append(floats("mode", "B", 1, config.width))
        embed = make_piece(
            lambda: controlnet.ModeEmbedding(config.modes, config.width), compute, value_of(mode)
        )
        stages.append(Stage(embed, (mode.name,), ("mode",), "controlnet_mode_embedder."))
    return Chain(name, tuple(inputs), tuple(outputs), tuple(stages))


def _encoder_chain(
    name: str, config: ControlNetConfig, patch_size: int, compute: ComputeType
) -> Chain:
    """The convolutions that pixels go through, once a picture."""
    images = floats("images", "B", 3, "H", "W")
    hint = make_piece(
        lambda: controlnet.Hint(config.hint_channels, patch_size), compute, value_of(images)
    )
    output = floats("control_latents", "B", "L", config.control_channels)
    stage = Stage(hint, ("images",), ("control_latents",), "input_hint_block.")
    return Chain(name, (images,), (output,), (stage,))


def controlnet_components(number: int) -> tuple[Component, ...]:
    """Those of one ControlNet, by its number from 0, in the order of a picture."""
    part = controlnet_name(number)

    def config(networks: Networks) -> ControlNetConfig:
        return networks.controlnets[number]

    return (
        Component(
            name=f"{part}_encoder",
            part=part,
            chain=lambda networks, compute: _encoder_chain(
                f"{part}_encoder", config(networks), networks.transformer.patch_size, compute
            ),
            activations=functools.partial(controlnet_encoder_bytes, number),
            turn="encode",
            present=lambda networks: bool(config(networks).hint_channels),
        ),
        Component(
            name=f"{part}_conditioner",
            part=part,
            chain=lambda networks, compute: _conditioner_chain(
                f"{part}_conditioner", config(networks), compute
            ),
            activations=functools.partial(controlnet_conditioner_bytes, number),
            turn="encode",
            vocabulary=lambda networks: config(networks).modes,
        ),
        Component(
            name=part,
            part=part,
            chain=lambda networks, compute: _step_chain(part, config(networks), compute),
            activations=functools.partial(controlnet_bytes, number),
            turn="denoise",
        ),
    )
