"""The stages of an encoder of pictures, which components begin with that read pictures."""

from __future__ import annotations

from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.components.chain import Stage, Value
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from exporters.models import image_encoders
from fluxdeploy.bundle.manifest import TensorSpec

__all__ = ["embedding_stages", "feature_stages", "pixel_values"]

_PREFIX = "vision_model."


def pixel_values(config: ImageEncoderConfig) -> TensorSpec:
    """The input: pictures of the encoder's own size, as `fluxdeploy.host.image_encoders` makes
    them."""
    return floats("pixel_values", "B", 3, config.image_size, config.image_size)


def feature_stages(
    config: ImageEncoderConfig, compute: ComputeType, writes: str, scope: str = ""
) -> list[Stage]:
    """From `pixel_values` to the features of all patches of SigLIP, [B,P,W] in the compute type.

    scope: what stands before the encoder's tensors.
    """
    hidden = _hidden(config, compute)
    norm = make_piece(lambda: image_encoders.FeatureNorm(config), compute, hidden)
    return [
        *_layer_stages(config, compute, scope),
        Stage(norm, (f"hidden.{config.layers}",), (writes,), f"{scope}{_PREFIX}"),
    ]


def embedding_stages(
    config: ImageEncoderConfig, compute: ComputeType, writes: str, scope: str = ""
) -> list[Stage]:
    """From `pixel_values` to CLIP's embedding of each picture, [B,E], float32.

    scope: what stands before the encoder's tensors.
    """
    hidden = _hidden(config, compute)
    embed = make_piece(lambda: image_encoders.PictureEmbedding(config), compute, hidden)
    return [
        *_layer_stages(config, compute, scope),
        Stage(embed, (f"hidden.{config.layers}",), (writes,), scope),
    ]


def _layer_stages(config: ImageEncoderConfig, compute: ComputeType, scope: str) -> list[Stage]:
    """From `pixel_values` to the last layer's `hidden.n`."""
    pixels, hidden = value_of(pixel_values(config)), _hidden(config, compute)
    embed = make_piece(lambda: image_encoders.PatchEmbedding(config), compute, pixels)
    layer = make_piece(lambda: image_encoders.VisionLayer(config), compute, hidden)
    scope += _PREFIX
    return [
        Stage(embed, ("pixel_values",), ("hidden.0",), scope),
        *(
            Stage(layer, (f"hidden.{i}",), (f"hidden.{i + 1}",), f"{scope}encoder.layers.{i}.")
            for i in range(config.layers)
        ),
    ]


def _hidden(config: ImageEncoderConfig, compute: ComputeType) -> Value:
    return Value(compute.dtype, ("B", config.tokens, config.width))
