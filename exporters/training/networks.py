"""The demo model's text encoders and transformer, and how they compute a velocity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from exporters.synthetic.small_tokenizers import TokenizerSizes
from exporters.tokenizers import open_tokenizer

__all__ = ["TEXT_LENGTH", "TextEncoders", "image_ids", "make_transformer", "velocity"]

TEXT_LENGTH = 20
"""T5 tokens of a prompt. The longest caption of the training has 17."""

_TEXT_WIDTH = 128
_POOLED_WIDTH = 96


def make_transformer(guidance_embedding: bool) -> FluxTransformer2DModel:
    """A small MM-DiT in FLUX.1's configuration, whose blocks start as the identity."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH,
        guidance_embeds=guidance_embedding,
        axes_dims_rope=(8, 12, 12),
    )
    # adaLN-Zero, W. Peebles and S. Xie, 2022.
    zeroed: list[nn.Module] = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in zeroed:
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
    return transformer


class TextEncoders(nn.Module):
    """CLIP and T5 with their tokenizers, from a folder that `write_tokenizers` filled."""

    def __init__(self, folder: Path, sizes: TokenizerSizes) -> None:
        super().__init__()
        self._clip_tokenizer = open_tokenizer(folder / "tokenizer", "clip")
        self._t5_tokenizer = open_tokenizer(folder / "tokenizer_2", "t5", TEXT_LENGTH)
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=sizes.clip_vocab_size,
                hidden_size=_POOLED_WIDTH,
                intermediate_size=2 * _POOLED_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=3,
                bos_token_id=sizes.clip_bos_token_id,
                eos_token_id=sizes.clip_eos_token_id,
                pad_token_id=sizes.clip_eos_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=sizes.t5_vocab_size,
                d_model=_TEXT_WIDTH,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        # Order reaches T5 through this table alone. Near zero, as T5 starts, it takes many times
        # longer to learn which colour stands before which shape.
        positions = self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        nn.init.normal_(positions.weight, std=2.0)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T5's states [B, TEXT_LENGTH, 128] and CLIP's pooled state [B, 96] of B prompts."""
        device = next(self.parameters()).device
        clip_ids = torch.from_numpy(self._clip_tokenizer.encode(prompts)).long().to(device)
        t5_ids = torch.from_numpy(self._t5_tokenizer.encode(prompts)).long().to(device)
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """RoPE positions [L, 3] of the packed latents of a picture, sizes in pixels."""
    rows = torch.arange(height // 16, device=device)
    columns = torch.arange(width // 16, device=device)
    ids = torch.cartesian_prod(rows, columns)
    return nn.functional.pad(ids, (1, 0)).float()


def velocity(
    transformer: nn.Module,
    x: Tensor,
    t: Tensor,
    text: tuple[Tensor, Tensor],
    size: tuple[int, int],
    guidance: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """The velocity at noise level `t` [B] in [0, 1] of packed latents `x` [B, L, 64]; float32.

    reference: latents [B, L, 64] of a picture of that size, as FLUX.1 Kontext takes it: its tokens
    stand behind those of `x`, at the same places, with 1 in the first axis of their positions.
    """
    states, pooled = text
    ids, tokens = image_ids(*size, x.device), x.shape[1]
    if reference is not None:
        x = torch.cat([x, reference], dim=1)
        ids = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0], device=x.device)])
    result: Any = transformer(
        hidden_states=x,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT_LENGTH, 3, device=x.device),
        return_dict=False,
    )
    velocity: Tensor = result[0][:, :tokens].float()
    return velocity
