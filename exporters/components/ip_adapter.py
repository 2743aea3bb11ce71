"""An IP-Adapter, whose two components run once a picture that is given.

`ip_adapter_encoder` makes an embedding of the picture, and `ip_adapter` what each double-stream
block of the transformer attends to.
"""

from __future__ import annotations

from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.ip_adapter_config import IpAdapterConfig
from exporters.components.activations import ip_adapter_bytes, ip_adapter_encoder_bytes
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import Component, Networks
from exporters.components.image_encoders import embedding_stages, pixel_values
from exporters.components.mmdit import seen_specs
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from exporters.models import ip_adapter

__all__ = ["IP_ADAPTER", "IP_ADAPTER_ENCODER"]


def _adapter(networks: Networks) -> IpAdapterConfig:
    assert networks.ip_adapter is not None  # or the component is not present
    return networks.ip_adapter


def _encoder(networks: Networks) -> ImageEncoderConfig:
    assert networks.ip_adapter_encoder is not None  # or the component is not present
    return networks.ip_adapter_encoder


def _encoder_chain(networks: Networks, compute: ComputeType) -> Chain:
    config = _encoder(networks)
    output = floats("image_embeds", "B", config.projection)
    stages = embedding_stages(config, compute, output.name)
    return Chain("ip_adapter_encoder", (pixel_values(config),), (output,), tuple(stages))


def _chain(networks: Networks, compute: ComputeType) -> Chain:
    config, adapter = networks.transformer, _adapter(networks)
    embeds = floats("image_embeds", "B", adapter.embedding_width)
    outputs = seen_specs(config, adapter.tokens)
    project = make_piece(
        lambda: ip_adapter.PictureTokens(
            adapter.embedding_width, adapter.tokens, adapter.token_width
        ),
        compute,
        value_of(embeds),
    )
    tokens = Value(compute.dtype, ("B", adapter.tokens, adapter.token_width))
    attend = make_piece(
        lambda: ip_adapter.KeysAndValues(adapter.token_width, config.width), compute, tokens
    )
    names = [[f"{spec.name}.{i}" for i in range(config.double_blocks)] for spec in outputs]
    row = value_of(floats("row", "B", adapter.tokens, config.width))
    stack = make_piece(ip_adapter.StackSeen, compute, *[row] * config.double_blocks)
    stages = (
        Stage(project, ("image_embeds",), ("tokens",), "image_proj."),
        *(
            Stage(attend, ("tokens",), pair, f"ip_adapter.{i}.")
            for i, pair in enumerate(zip(*names, strict=True))
        ),
        *(
            Stage(stack, tuple(rows), (spec.name,), f"{spec.name}.")
            for rows, spec in zip(names, outputs, strict=True)
        ),
    )
    return Chain("ip_adapter", (embeds,), outputs, stages)


IP_ADAPTER_ENCODER = Component(
    name="ip_adapter_encoder",
    part="ip_adapter_encoder",
    chain=_encoder_chain,
    activations=ip_adapter_encoder_bytes,
    turn="encode",
    present=lambda networks: networks.ip_adapter is not None,
)

IP_ADAPTER = Component(
    name="ip_adapter",
    part="ip_adapter",
    chain=_chain,
    activations=ip_adapter_bytes,
    turn="encode",
    present=lambda networks: networks.ip_adapter is not None,
)
