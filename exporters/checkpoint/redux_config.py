"""The sizes of a FLUX.1 Redux: an encoder of pictures, and its features as text embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.checkpoint.agreement import check_class, check_said, unknown_keys
from exporters.checkpoint.config import shape_of
from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.pixels import pixel_notices, read_pixels
from exporters.checkpoint.tensors import Weights
from fluxdeploy.bundle.pixels import PixelSpec
from fluxdeploy.errors import CheckpointError

__all__ = ["EMBEDDER", "ENCODER", "EXTRACTOR", "ReduxConfig"]

ENCODER, EMBEDDER, EXTRACTOR = "image_encoder", "image_embedder", "feature_extractor"
"""What diffusers' layout calls the folders, of whose names those of the part's tensors and its
configs begin."""

_KEYS = ("redux_dim", "txt_in_features")


@dataclass(frozen=True)
class ReduxConfig:
    """Sizes of a Redux: its SigLIP, and the two linears after it.

    hidden_width: between the two. text_width: of a token, as T5's. pixels: how a picture becomes
    what SigLIP reads.
    """

    encoder: ImageEncoderConfig
    hidden_width: int
    text_width: int
    pixels: PixelSpec

    @property
    def tokens(self) -> int:
        """P: the text tokens that pictures become."""
        return self.encoder.tokens

    @classmethod
    def of(cls, weights: Weights, configs: Mapping[str, Any]) -> ReduxConfig:
        """The sizes of `weights`; `configs` has those of the three folders, by their names.

        Raises `CheckpointError` for what is no Redux, and where the sizes contradict each other or
        the configs.
        """
        said = configs[EMBEDDER]
        check_class("Redux's image_embedder", said, "ReduxImageEncoder")
        hidden, width = shape_of(weights, f"{EMBEDDER}.redux_up.weight", 2)
        text, back = shape_of(weights, f"{EMBEDDER}.redux_down.weight", 2)
        inside = {name.removeprefix(f"{ENCODER}."): t for name, t in weights.items()}
        encoder = ImageEncoderConfig.of("siglip", inside, configs[ENCODER])
        if hidden != back:
            raise CheckpointError(
                f"Redux's redux_up gives {hidden} numbers, and its redux_down takes {back}: they "
                "are not of one Redux."
            )
        if encoder.width != width:
            raise CheckpointError(
                f"Redux's redux_up takes features of {width} numbers, and its image encoder gives "
                f"{encoder.width}: they do not belong together."
            )
        found = {"redux_dim": width, "txt_in_features": text}
        check_said("Redux's image_embedder", said, found)
        pixels = read_pixels(configs[EXTRACTOR], Path(EXTRACTOR, "preprocessor_config.json"))
        side = encoder.image_size
        if pixels.size != (side, side):
            height, width = pixels.size
            raise CheckpointError(
                f"Redux's preprocessor_config.json makes pictures of {width}x{height} pixels, and "
                f"its image encoder reads {side}x{side}: they do not belong together."
            )
        return cls(encoder, hidden, text, pixels)

    @staticmethod
    def notices(configs: Mapping[str, Any]) -> tuple[str, ...]:
        """A sentence for each thing in a Redux's configs that may not be meant."""
        told = unknown_keys("The config.json of Redux's image_embedder", configs[EMBEDDER], _KEYS)
        return told + pixel_notices(configs[EXTRACTOR])
