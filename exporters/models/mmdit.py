"""FLUX.1's MM-DiT, cut into the stages that run once a picture and those that run every step.

Sizes: B batch, S text tokens, L image tokens, T = S + L, N timesteps, D width. Norms, RoPE, softmax
and the sinusoidal embedding compute in float32 whatever the precision; linears compute in the type
of their weights, and the residual stream has the type that enters a block.

The arithmetic follows "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(Esser et al., 2024) for the double-stream blocks and "Scaling Vision Transformers to 22 Billion
Parameters" (Dehghani et al., 2023) for the parallel single-stream blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters.models.attention import attention, few_keys_attention

__all__ = [
    "AdaptiveNorm",
    "AddImageResidual",
    "AddResidual",
    "DoubleBlock",
    "DoubleBlockModulation",
    "FinalModulation",
    "ImageProjection",
    "JoinStreams",
    "OnePieceProjection",
    "OutputProjection",
    "PackModulation",
    "RopeTables",
    "SingleBlock",
    "SingleBlockModulation",
    "TakeSeen",
    "TextProjection",
    "TimestepEmbedding",
]

DOUBLE_ROWS = 12  # (shift, scale, gate) for attention and MLP, image stream first, then text
SINGLE_ROWS = 3  # shift, scale, gate
FINAL_ROWS = 2  # shift, scale


class AdaptiveNorm(nn.Module):
    """LayerNorm without parameters, then x · (1 + scale) + shift with scale and shift [B,1,D]."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        return (normed * (1 + scale) + shift).to(dtype)


class HeadNorm(nn.Module):
    """RMSNorm over the channels of a head; returns float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight.float()


class GeluProjection(nn.Module):
    """linear, GELU (tanh form): the first half of a feed-forward, stored as `net.0.proj`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """linear, GELU (tanh form), linear; the place between is dropout in the checkpoint's model."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GeluProjection(width, hidden), nn.Identity(), nn.Linear(hidden, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B,T,D] to [B,T,heads,head_dim]."""
    return x.unflatten(-1, (-1, head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved channel pairs: x [B,T,heads,head_dim], tables [T,head_dim].

    Each pair (a, b) becomes (a·cos − b·sin, b·cos + a·sin); both channels of a pair hold the same
    angle in the tables.
    """
    a, b = x.unflatten(-1, (-1, 2)).split(1, dim=-1)
    turned = torch.cat((-b, a), -1).flatten(-2)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def joint_attention(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Attention of Q, K, V [B,T,heads,head_dim]; returns [B,T,D]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attention(query, key, value, head_dim**-0.5).transpose(1, 2).flatten(2)


def add_gated(residual: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """residual + gate · update, in float32, in the residual stream's type."""
    return (residual.float() + gate * update.float()).to(residual.dtype)


def add_seen(
    residual: Tensor, query: Tensor, keys: Tensor, values: Tensor, head_dim: int
) -> Tensor:
    """residual + softmax(Q Kᵀ) V, for Q [B,L,heads,head_dim] and K, V [B,V,D]."""
    query, key, value = (
        x.transpose(1, 2)
        for x in (query, split_heads(keys, head_dim), split_heads(values, head_dim))
    )
    update = few_keys_attention(query, key, value, head_dim**-0.5).transpose(1, 2).flatten(2)
    return (residual.float() + update.float()).to(residual.dtype)


class JointAttention(nn.Module):
    """q, k, v and output projections of both streams, for attention over their joint sequence."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            nn.Linear(width, width) for _ in range(3)
        )
        self.norm_q, self.norm_k = HeadNorm(head_dim), HeadNorm(head_dim)
        self.norm_added_q, self.norm_added_k = HeadNorm(head_dim), HeadNorm(head_dim)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, context: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What both streams get, and the image's query [B,L,heads,head_dim] before RoPE."""

        def heads(x: Tensor) -> Tensor:
            return split_heads(x, self.head_dim)

        # Text comes first in the joint sequence, as in the RoPE tables.
        text_query = self.norm_added_q(heads(self.add_q_proj(context)))
        image_query = self.norm_q(heads(self.to_q(hidden)))
        query = torch.cat((text_query, image_query), dim=1)
        key = torch.cat(
            (
                self.norm_added_k(heads(self.add_k_proj(context))),
                self.norm_k(heads(self.to_k(hidden))),
            ),
            dim=1,
        )
        value = torch.cat((heads(self.add_v_proj(context)), heads(self.to_v(hidden))), dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        joint = joint_attention(query, key, value, self.head_dim)
        text_tokens = context.shape[1]
        return (
            self.to_out[0](joint[:, text_tokens:]),
            self.to_add_out(joint[:, :text_tokens]),
            image_query,
        )


class DoubleBlock(nn.Module):
    """A double-stream block: joint attention, then an MLP for each stream."""

    def __init__(self, width: int, head_dim: int, mlp_width: int) -> None:
        super().__init__()
        self.norm = AdaptiveNorm()
        self.attn = JointAttention(width, head_dim)
        self.ff = FeedForward(width, mlp_width)
        self.ff_context = FeedForward(width, mlp_width)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        *seen: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """hidden [B,L,D], context [B,S,D], modulation float32 [B,12,D]; returns both streams.

        seen: nothing, or the keys and values [B,V,D] that an IP-Adapter makes of a picture, to
        which the image attends besides.
        """
        rows = modulation.split(1, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows[:6]
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = rows[6:]
        dtype = self.attn.to_q.weight.dtype
        update, c_update, query = self.attn(
            self.norm(hidden, shift, scale, dtype),
            self.norm(context, c_shift, c_scale, dtype),
            cos,
            sin,
        )
        hidden = add_gated(hidden, gate, update)
        context = add_gated(context, c_gate, c_update)
        update = self.ff(self.norm(hidden, mlp_shift, mlp_scale, dtype))
        c_update = self.ff_context(self.norm(context, c_mlp_shift, c_mlp_scale, dtype))
        hidden = add_gated(hidden, mlp_gate, update)
        if seen:
            keys, values = seen
            hidden = add_seen(hidden, query, keys, values, self.attn.head_dim)
        return hidden, add_gated(context, c_mlp_gate, c_update)


class SelfAttention(nn.Module):
    """q, k, v of a single-stream block; its output projection is fused with the MLP's."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = HeadNorm(head_dim), HeadNorm(head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            split_heads(linear(x), self.head_dim) for linear in (self.to_q, self.to_k, self.to_v)
        )
        query = rotate(self.norm_q(query), cos, sin)
        key = rotate(self.norm_k(key), cos, sin)
        return joint_attention(query, key, value, self.head_dim)


class SingleBlock(nn.Module):
    """A single-stream block: attention and MLP in parallel over the joint sequence."""

    def __init__(self, width: int, head_dim: int, mlp_width: int) -> None:
        super().__init__()
        self.norm = AdaptiveNorm()
        self.attn = SelfAttention(width, head_dim)
        self.proj_mlp = nn.Linear(width, mlp_width)
        self.proj_out = nn.Linear(width + mlp_width, width)

    def forward(self, joint: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """joint [B,T,D], modulation float32 [B,3,D]; returns [B,T,D]."""
        shift, scale, gate = modulation.split(1, dim=1)
        x = self.norm(joint, shift, scale, self.proj_mlp.weight.dtype)
        mlp = F.gelu(self.proj_mlp(x), approximate="tanh")
        return add_gated(
            joint, gate, self.proj_out(torch.cat((self.attn(x, cos, sin), mlp), dim=-1))
        )


class ImageProjection(nn.Module):
    """What a step does before the blocks: project the latents, hand each block its rows."""

    def __init__(
        self, in_channels: int, width: int, double: int, single: int, residual: torch.dtype
    ) -> None:
        super().__init__()
        self.residual = residual
        self.rows = [DOUBLE_ROWS] * double + [SINGLE_ROWS] * single + [FINAL_ROWS]
        self.x_embedder = nn.Linear(in_channels, width)

    def forward(
        self, hidden_states: Tensor, context: Tensor, modulation: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns hidden [B,L,D], context [B,S,D] and the rows of each block, in order."""
        hidden = self.x_embedder(hidden_states.to(self.x_embedder.weight.dtype))
        return (
            hidden.to(self.residual),
            context.to(self.residual),
            *modulation.split(self.rows, dim=1),
        )


class AddResidual(nn.Module):
    """What a ControlNet adds to the image's stream after a double-stream block."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, hidden: Tensor, residuals: Tensor) -> Tensor:
        """hidden [B,L,D], residuals float32 [n,B,L,D], of which one row is added."""
        return hidden + residuals[self.row].to(hidden.dtype)


class AddImageResidual(nn.Module):
    """What a ControlNet adds to the image's tokens after a single-stream block."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, joint: Tensor, context: Tensor, residuals: Tensor) -> Tensor:
        """joint [B,T,D], context [B,S,D], residuals float32 [n,B,L,D]."""
        text, image = joint.split((context.shape[1], joint.shape[1] - context.shape[1]), dim=1)
        return torch.cat((text, image + residuals[self.row].to(joint.dtype)), dim=1)


class TakeSeen(nn.Module):
    """What an IP-Adapter's pictures are to each double-stream block: all keys, then all values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """keys and values are float32 [n,B,V,D], each of the results is [B,V,D]."""
        return tuple(
            row.squeeze(0).to(self.dtype) for rows in (keys, values) for row in rows.split(1, dim=0)
        )


class JoinStreams(nn.Module):
    """Text, then image tokens: the sequence of the single-stream blocks."""

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        return torch.cat((context, hidden), dim=1)


class OutputProjection(nn.Module):
    """The final AdaLN and projection of the image tokens: velocity [B,L,out_channels], float32."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm = AdaptiveNorm()
        self.proj_out = nn.Linear(width, out_channels)

    def forward(self, joint: Tensor, context: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.split(1, dim=1)
        hidden = joint[:, context.shape[1] :]
        return self.proj_out(self.norm(hidden, shift, scale, self.proj_out.weight.dtype)).float()


class TextProjection(nn.Module):
    """T5's embeddings [B,S,text_width] to the context stream [B,S,D], float32."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(text_width, width)

    def forward(self, text_embeddings: Tensor) -> Tensor:
        return self.context_embedder(text_embeddings.to(self.context_embedder.weight.dtype)).float()


class EmbeddingMLP(nn.Module):
    """linear, SiLU, linear."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype)))).float()


def sinusoidal_embedding(t: Tensor) -> Tensor:
    """t in 0..1, [N], to float32 [N,256]: cosines, then sines, of 1000·t at 128 frequencies."""
    # Angles reach thousands of radians, where a few ulp of a frequency show in the picture. The
    # exponents round as in training; their float64 exponential is folded into a float32 constant.
    exponents = torch.arange(128, dtype=torch.float32) * -math.log(10000) / 128
    angles = (t * 1000)[:, None] * torch.exp(exponents.double()).float()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """The vector that drives every AdaLN: SiLU of the embedded timestep, guidance and pooled text.

    With `schedule` the timesteps are those of a whole schedule and the result [N,B,D] pairs each
    with each prompt; without, there is one timestep a prompt and the result is [B,D].
    """

    def __init__(self, pooled_width: int, width: int, guidance: bool, schedule: bool) -> None:
        super().__init__()
        self.schedule = schedule
        self.time_text_embed = nn.ModuleDict(
            {"timestep_embedder": EmbeddingMLP(256, width)}
            | ({"guidance_embedder": EmbeddingMLP(256, width)} if guidance else {})
            | {"text_embedder": EmbeddingMLP(pooled_width, width)}
        )

    def forward(self, pooled: Tensor, timestep: Tensor, guidance: Tensor | None = None) -> Tensor:
        embed = self.time_text_embed
        vector = embed["timestep_embedder"](sinusoidal_embedding(timestep))
        if self.schedule:
            vector = vector[:, None]
        if guidance is not None:
            vector = vector + embed["guidance_embedder"](sinusoidal_embedding(guidance))
        return F.silu(vector + embed["text_embedder"](pooled))


class ModulationLinear(nn.Module):
    """An AdaLN linear: vector [..., D] to rows [..., rows, D], float32."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(width, rows * width)

    def forward(self, vector: Tensor) -> Tensor:
        rows = self.linear(vector.to(self.linear.weight.dtype))
        return rows.unflatten(-1, (self.rows, -1)).float()


class DoubleBlockModulation(nn.Module):
    """The 12 rows of a double-stream block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = ModulationLinear(width, DOUBLE_ROWS // 2)
        self.norm1_context = ModulationLinear(width, DOUBLE_ROWS // 2)

    def forward(self, vector: Tensor) -> Tensor:
        return torch.cat((self.norm1(vector), self.norm1_context(vector)), dim=-2)


class SingleBlockModulation(nn.Module):
    """The 3 rows of a single-stream block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ModulationLinear(width, SINGLE_ROWS)

    def forward(self, vector: Tensor) -> Tensor:
        return self.norm(vector)


class FinalModulation(nn.Module):
    """The 2 rows of the final AdaLN.

    One linear each, since the two checkpoint layouts store them in opposite orders.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)

    def forward(self, vector: Tensor) -> Tensor:
        x = vector.to(self.shift.weight.dtype)
        return torch.stack((self.shift(x), self.scale(x)), dim=-2).float()


class PackModulation(nn.Module):
    """The rows of all blocks, in order, as one tensor [N,B,M,D]."""

    def forward(self, *rows: Tensor) -> Tensor:
        return torch.cat(rows, dim=-2)


class OnePieceProjection(nn.Module):
    """The image projection of the one-piece transformer, which makes its own context and rows."""

    def __init__(self, in_channels: int, width: int, residual: torch.dtype) -> None:
        super().__init__()
        self.residual = residual
        self.x_embedder = nn.Linear(in_channels, width)

    def forward(self, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.x_embedder(hidden_states.to(self.x_embedder.weight.dtype))
        return hidden.to(self.residual), context.to(self.residual)


class RopeTables(nn.Module):
    """RoPE tables [T,head_dim] from ids [S,3] and [L,3], inside the one-piece transformer's graph.

    float32 throughout: engines have no float64 and ids stay below a few hundred, which keeps the
    angles within 1e-5 of the host's float64 tables.
    """

    def __init__(self, axes_dims: tuple[int, ...], theta: float) -> None:
        super().__init__()
        self.axes_dims = axes_dims
        self.theta = theta

    def forward(self, img_ids: Tensor, txt_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.cat((txt_ids, img_ids), dim=0)
        angles = torch.cat(
            [
                ids[:, axis : axis + 1]
                * self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
                for axis, dim in enumerate(self.axes_dims)
            ],
            dim=-1,
        ).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()
