"""How much memory a run of a component takes besides its weights.

An engine's memory is not known before it is built, and a session's not before it runs. The formulas
below count the tensors that are alive at the peak of each network: the attention or the MLP of a
block, and the VAE's level of full resolution. How many of them a runtime has alive at once was
measured; `benchmarks/plan_memory.py` compares the formulas with measurements.

Symbols: B pictures at once (the VAE has one), S text tokens, L image tokens, T = S + L, N steps,
D a network's width, F its MLP's, h heads, M modulation rows, P pixels and p latent pixels of a
picture, C the channels with which the VAE's level of full resolution begins or ends.

Plain attention, as PyTorch and ONNX Runtime compute it: all is float32, and attention's scores are
in memory, three times at once.

    transformer  4 B (T (5 D + F) + 3 h T²)
    t5           4 B (S (6 D + 3 F) + 3 h S²) + 4 h S², the position bias
    clip         as t5, with S = 77 and no bias
    conditioner  4 (3 N B M D + B S (E + D)), E the width of T5
    VAE          4 max(6 C P, 3 p²), with p² the scores of its one attention

ONNX Runtime's own attention on CPUs, which the transformer has there in float32, keeps no scores:

    transformer  4 B T (14 D + 2 F)

TensorRT fuses the attention of transformer and VAE, so that memory grows with T and P alone.
Tensors are in the type that the component computes in, of e bytes, but for norms, which are in
float32. T5's attention has a bias and is not fused.

    transformer  B T (13 e D + 2 e F) + 12 MB
    t5           B (4 + e) h S² + 4 h S² + e B S (6 D + 3 F)
    clip         as t5, with S = 77 and no bias
    conditioner  4 (4 N B M D + B S (E + D))
    VAE          (4 + 3 e) C P
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines import AttentionKernels

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["Workload", "activation_bytes"]


_SCORES = 3
"""Copies of attention's scores that ONNX Runtime has alive at once."""

_PICTURE = 6
"""Tensors of the full resolution that ONNX Runtime has alive at once in the VAE."""

_MYELIN = 12_000_000
"""Bytes that TensorRT's fused blocks take at any size."""


@dataclass(frozen=True)
class Workload:
    """What components run on: pictures in a call, tokens of text and of a picture, timesteps."""

    batch: int
    text: int
    image: int
    steps: int


def activation_bytes(
    checkpoint: Checkpoint, name: str, workload: Workload, kernels: AttentionKernels, element: int
) -> int:
    """Bytes that a run of a component takes besides its weights.

    `element` are the bytes of the type that the component computes in. Pictures go through the VAE
    one at a time.
    """
    fused = kernels is AttentionKernels.TENSORRT
    if name == "transformer":
        return _transformer(checkpoint, workload, kernels, element)
    if name == "conditioner":
        return _conditioner(checkpoint, workload, fused)
    if name == "t5":
        t5 = checkpoint.t5
        return _encoder(
            workload.batch,
            workload.text,
            (t5.d_model, t5.d_ff, t5.num_heads),
            fused,
            element,
            bias=True,
        )
    if name == "clip":
        clip = checkpoint.clip
        sizes = (clip.hidden_size, clip.intermediate_size, clip.num_attention_heads)
        tokens = clip.max_position_embeddings
        return _encoder(workload.batch, tokens, sizes, fused, element, bias=False)
    return _vae(checkpoint, name, workload, fused, element)


def _transformer(
    checkpoint: Checkpoint, workload: Workload, kernels: AttentionKernels, element: int
) -> int:
    config = checkpoint.transformer
    tokens = workload.text + workload.image
    if kernels is AttentionKernels.ONNX_RUNTIME:
        return 4 * workload.batch * tokens * (14 * config.width + 2 * config.mlp_width)
    if kernels is AttentionKernels.TENSORRT:
        token = element * (13 * config.width + 2 * config.mlp_width)
        return workload.batch * tokens * token + _MYELIN
    heads = config.width // config.head_dim
    streams = tokens * (5 * config.width + config.mlp_width)
    return 4 * workload.batch * (streams + _SCORES * heads * tokens**2)


def _encoder(
    batch: int,
    tokens: int,
    sizes: tuple[int, int, int],
    fused: bool,
    element: int,
    bias: bool,
) -> int:
    """A text encoder of `sizes` width, MLP width and heads."""
    width, mlp_width, heads = sizes
    scores = heads * tokens**2
    streams = tokens * (6 * width + 3 * mlp_width)
    shared = 4 * scores if bias else 0
    if fused:
        return batch * ((4 + element) * scores + element * streams) + shared
    return 4 * batch * (_SCORES * scores + streams) + shared


def _conditioner(checkpoint: Checkpoint, workload: Workload, fused: bool) -> int:
    config, batch = checkpoint.transformer, workload.batch
    rows = workload.steps * batch * config.modulation_rows * config.width
    text = batch * workload.text * (config.text_width + config.width)
    return 4 * ((4 if fused else 3) * rows + text)


def _vae(checkpoint: Checkpoint, name: str, workload: Workload, fused: bool, element: int) -> int:
    config = checkpoint.vae
    # The decoder enters its last level with the channels of the one before.
    wide = name == "vae_decoder" and len(config.channels) > 1
    channels = config.channels[1] if wide else config.channels[0]
    latents = 4 * workload.image  # a token is a patch of 2 by 2
    pixels = latents * config.spatial_factor**2
    if fused:
        return (4 + 3 * element) * channels * pixels
    return 4 * max(_PICTURE * channels * pixels, _SCORES * latents**2)
