"""SigLIP's and CLIP's encoders of pictures as stages, around a layer of transformers.

A vision transformer (Dosovitskiy et al., 2020, arXiv 2010.11929) reads patches as tokens. CLIP's
has a token more, which stands for the whole picture, and a norm before its layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.models.attention import FOR_TRANSFORMERS

__all__ = ["FeatureNorm", "PatchEmbedding", "PictureEmbedding", "VisionLayer"]


class _Embeddings(nn.Module):
    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        side, width = config.patch_size, config.width
        self.patch_embedding = nn.Conv2d(3, width, side, side, bias=not config.class_token)
        self.position_embedding = nn.Embedding(config.tokens, width)
        token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.class_embedding = token

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        hidden = patches.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            token = self.class_embedding.expand(hidden.shape[0], 1, -1)
            hidden = torch.cat((token, hidden), dim=1)
        return hidden + self.position_embedding.weight


class PatchEmbedding(nn.Module):
    """Pixels [B,3,H,W] to the embeddings of their patches [B,P,W], the class token's before them.

    Rows and columns that make no whole patch are cut off.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.class_token else None
        # As transformers spells it.
        self.pre_layrnorm = norm

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden: Tensor = self.embeddings(pixel_values)
        return hidden if self.pre_layrnorm is None else self.pre_layrnorm(hidden)


class VisionLayer(CLIPEncoderLayer):
    """An encoder layer, [B,P,W] to [B,P,W]; SigLIP's are CLIP's."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        own = CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            layer_norm_eps=config.norm_eps,
        )
        own._attn_implementation = FOR_TRANSFORMERS
        super().__init__(own)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden, attention_mask=None)


class FeatureNorm(nn.Module):
    """SigLIP's final norm of all patches, [B,P,W]."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.post_layernorm(hidden)


class PictureEmbedding(nn.Module):
    """CLIP's embedding of a whole picture: its first token [B,P,W], normed and projected, [B,E]."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.vision_model = nn.ModuleDict(
            {"post_layernorm": nn.LayerNorm(config.width, eps=config.norm_eps)}
        )
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.vision_model["post_layernorm"](hidden[:, 0])
        return self.visual_projection(normed).float()
