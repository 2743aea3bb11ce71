"""FLUX.1 Redux: a picture becomes text embeddings, once a picture."""

from __future__ import annotations

from exporters.checkpoint.checkpoint import REDUX
from exporters.checkpoint.redux_config import EMBEDDER, ENCODER, ReduxConfig
from exporters.components.activations import redux_bytes
from exporters.components.chain import Chain, Stage, Value
from exporters.components.component import Component, Networks
from exporters.components.image_encoders import feature_stages, pixel_values
from exporters.components.pieces import ComputeType, floats, make_piece
from exporters.models.redux import ReduxProjection

__all__ = ["REDUX_COMPONENT"]


def _chain(config: ReduxConfig, compute: ComputeType) -> Chain:
    """SigLIP up to the features of all patches, and the two linears."""
    encoder = config.encoder
    features = Value(compute.dtype, ("B", config.tokens, encoder.width))
    project = make_piece(
        lambda: ReduxProjection(encoder.width, config.hidden_width, config.text_width),
        compute,
        features,
    )
    stages = (
        *feature_stages(encoder, compute, "features", f"{ENCODER}."),
        Stage(project, ("features",), ("image_embeddings",), f"{EMBEDDER}."),
    )
    output = floats("image_embeddings", "B", config.tokens, config.text_width)
    return Chain(REDUX, (pixel_values(encoder),), (output,), stages)


def _of(networks: Networks) -> ReduxConfig:
    assert networks.redux is not None
    return networks.redux


REDUX_COMPONENT = Component(
    name=REDUX,
    part=REDUX,
    chain=lambda networks, compute: _chain(_of(networks), compute),
    activations=redux_bytes,
    turn="encode",
    # Trained in bfloat16, and nobody has looked whether its values leave float16's range.
    overflows_fp16=True,
)
