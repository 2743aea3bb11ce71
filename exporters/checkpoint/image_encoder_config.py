"""The sizes of an encoder of pictures, read from its config.json and held against its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.activations import ACT2FN

from exporters.checkpoint.agreement import check_same
from exporters.checkpoint.config import count_blocks
from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["ImageEncoderConfig", "with_vision_names"]

Kind = Literal["siglip", "clip"]

_PREFIX = "vision_model."
_CLASSES = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_MAX_SIZE = 1 << 20

_SPARE = re.compile(
    # The half for texts, what compares the two, and a buffer of older files.
    r"text_model\..*|text_projection\.weight|logit_(?:scale|bias)"
    r"|(?:vision_model\.)?embeddings\.position_ids"
)
_SIGLIP_HEAD = re.compile(r"(?:vision_model\.)?head\..*")
"""What makes one embedding of SigLIP's features."""


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of a vision transformer for square pictures.

    kind: SigLIP's gives the features of all patches; CLIP's has a class token and a norm before its
        layers, and gives an embedding of the whole picture.
    image_size, patch_size: sides in pixels. projection: the width of CLIP's embedding; 0 of
        SigLIP's.
    """

    kind: Kind
    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float
    projection: int = 0

    @property
    def class_token(self) -> bool:
        """Whether a token before the patches stands for the whole picture."""
        return self.kind == "clip"

    @property
    def patches(self) -> int:
        """How many whole patches a picture has."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def tokens(self) -> int:
        """P: the patches, and the class token."""
        return self.patches + self.class_token

    @classmethod
    def of(cls, kind: Kind, weights: Weights, config: Mapping[str, Any]) -> ImageEncoderConfig:
        """The sizes of `weights`, under the names of `with_vision_names`, by their config.json.

        Raises `CheckpointError` for an encoder of another kind, and where the two contradict each
        other.
        """
        said = _fields(kind, config)
        usual = _CLASSES[kind]()
        values = {name: said.get(name, getattr(usual, name)) for name in _SIZES}
        for name, value in values.items():
            if type(value) is not int or not 0 < value <= _MAX_SIZE:
                raise CheckpointError(
                    f"The image encoder's config.json says {name} {value!r:.80}; a whole number "
                    f"from 1 to {_MAX_SIZE} is needed."
                )
        projection = weights.get("visual_projection.weight")
        sizes = cls(
            kind,
            width=values["hidden_size"],
            mlp_width=values["intermediate_size"],
            layers=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            activation=said.get("hidden_act", usual.hidden_act),
            norm_eps=said.get("layer_norm_eps", usual.layer_norm_eps),
            projection=projection.shape[0] if kind == "clip" and projection is not None else 0,
        )
        sizes._check(weights)
        return sizes

    def _check(self, weights: Weights) -> None:
        """Hold what the config says against the tensors, before a network of its sizes is made."""
        if self.activation not in ACT2FN:
            raise CheckpointError(
                f"The image encoder's config.json names the activation {self.activation!r:.80}, "
                "which transformers does not have."
            )
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
            raise CheckpointError(
                f"The image encoder's config.json says layer_norm_eps {eps!r:.80}; a number from 0 "
                "to 1 is needed."
            )
        if self.width % self.heads:
            raise CheckpointError(
                f"The image encoder's config.json says {self.heads} heads for a width of "
                f"{self.width}: it must be a multiple of them."
            )
        if self.patch_size > self.image_size:
            raise CheckpointError(
                f"The image encoder's config.json says patches of {self.patch_size} pixels a side "
                f"for pictures of {self.image_size}."
            )
        side = self.patch_size
        shapes = {
            "embeddings.patch_embedding.weight": (self.width, 3, side, side),
            "embeddings.position_embedding.weight": (self.tokens, self.width),
            "encoder.layers.0.mlp.fc1.weight": (self.mlp_width, self.width),
        }
        for name, shape in shapes.items():
            found = weights.get(_PREFIX + name)
            if found is None or found.shape != shape:
                what = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise CheckpointError(
                    f"The image encoder's tensor {_PREFIX}{name} {what}; its config.json asks for "
                    f"{list(shape)}."
                )
        layers = count_blocks(weights, r"vision_model\.encoder\.layers\.(\d{1,9})\.")
        if layers != self.layers:
            raise CheckpointError(
                f"The image encoder has {layers} layers; its config.json asks for {self.layers}."
            )


def with_vision_names(kind: Kind, tensors: Weights) -> dict[str, StoredTensor]:
    """An image encoder's tensors under one name each, whatever version of transformers saved them.

    What no picture needs is left out: the half for texts, and SigLIP's last layer.
    """
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if _SPARE.fullmatch(name) or (kind == "siglip" and _SIGLIP_HEAD.fullmatch(name)):
            continue
        whole = name.startswith((_PREFIX, "visual_projection."))
        full = name if whole else f"{_PREFIX}{name}"
        if full in named:
            check_same(named[full], tensor)
        named[full] = tensor
    return named


def _fields(kind: Kind, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about pictures. Raises `CheckpointError` for another
    model's."""
    own = _CLASSES[kind].model_type
    said = config.get("model_type", own)
    if said not in (own, kind):
        raise CheckpointError(
            f"The image encoder's config.json says model_type {said!r:.80}; {own!r} or {kind!r} is "
            "needed."
        )
    nested = config.get("vision_config") if said == kind else None
    fields = nested if isinstance(nested, dict) else config
    if fields.get("num_channels", 3) != 3:
        raise CheckpointError(
            f"The image encoder's config.json says num_channels {fields['num_channels']!r:.80}; "
            "pictures have 3."
        )
    return fields
