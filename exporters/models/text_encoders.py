"""CLIP's and T5's encoders as stages, around the layers of transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5LayerNorm

from exporters.models.attention import FOR_TRANSFORMERS

__all__ = [
    "ClipEmbedding",
    "ClipLayer",
    "ClipPooling",
    "T5Embedding",
    "T5FinalNorm",
    "T5Layer",
    "T5PositionBias",
]


class ClipEmbedding(nn.Module):
    """Token ids int32 [B,77] to embeddings [B,77,P] and the causal mask [77,77]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
                "position_embedding": nn.Embedding(
                    config.max_position_embeddings, config.hidden_size
                ),
            }
        )

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = input_ids.shape[1]
        positions = self.embeddings["position_embedding"].weight
        mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        return self.embeddings["token_embedding"](input_ids) + positions, mask


class ClipLayer(CLIPEncoderLayer):
    """A causal encoder layer, [B,77,P] to [B,77,P]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        config._attn_implementation = FOR_TRANSFORMERS
        super().__init__(config)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden, attention_mask=mask)


class ClipPooling(nn.Module):
    """The final norm at the end-of-text token: [B,77,P] and ids to [B,P], float32.

    Configs written before transformers 4.31 call the end-of-text token 2, which is wrong for
    CLIP's vocabulary; there it is the largest id of the row, as transformers takes it too.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.end_of_text = config.eos_token_id
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        score = input_ids if self.end_of_text == 2 else input_ids == self.end_of_text
        last = score.float().argmax(dim=-1, keepdim=True)
        one_hot = (torch.arange(input_ids.shape[1])[None] == last).to(hidden.dtype)
        return self.final_layer_norm(one_hot[:, None] @ hidden)[:, 0].float()


class T5Embedding(nn.Module):
    """Token ids int32 [B,S] to embeddings [B,S,W]."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.shared(input_ids)


class T5PositionBias(nn.Module):
    """The attention bias by relative position that all layers share: float32 [1,heads,S,S]."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.relative_attention_bias = nn.Embedding(self.buckets, config.num_heads)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1])
        buckets = T5Attention._relative_position_bucket(
            positions[None, :] - positions[:, None],
            bidirectional=True,
            num_buckets=self.buckets,
            max_distance=self.max_distance,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None].float()


class T5Layer(T5Block):
    """An encoder layer, [B,S,W] to [B,S,W]."""

    def __init__(self, config: T5Config) -> None:
        config._attn_implementation = FOR_TRANSFORMERS
        super().__init__(config)

    def forward(self, hidden: Tensor, position_bias: Tensor) -> Tensor:
        return super().forward(hidden, position_bias=position_bias)[0]


class T5FinalNorm(nn.Module):
    """The final norm: [B,S,W] to float32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.final_layer_norm(hidden).float()
