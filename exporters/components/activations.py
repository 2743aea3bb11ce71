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

ONNX Runtime's own attention, which transformer and VAE have in float32 on CPUs, and the transformer
in 16 bits on GPUs too, keeps no scores:

    transformer  4 B T (14 D + 2 F)
    VAE          4 · 6 C P

In 16 bits most of these tensors are half as large, and no less is counted: on an H100 a process
took as much with them as with the same in float32 (`benchmarks/ort_cuda_step.py`).

TensorRT fuses the attention of transformer and VAE, so that memory grows with T and P alone.
Tensors are in the type that the component computes in, of e bytes, but for norms, which are in
float32. T5's attention has a bias and is not fused.

    transformer  B T (13 e D + 2 e F) + 12 MB
    t5           B (4 + e) h S² + 4 h S² + e B S (6 D + 3 F)
    clip         as t5, with S = 77 and no bias
    conditioner  4 (4 N B M D + B S (E + D))
    VAE          (4 + 3 e) C P

An IP-Adapter gives keys and values, 2 B V D numbers a double-stream block for V tokens of a
picture, and the transformer has scores of the image's tokens for these, in plain kernels.

A Redux is an encoder too, of a picture's patches in place of text tokens, and without a bias; the
text of conditioner, transformer and ControlNets is longer by as many.

A ControlNet's blocks take what the transformer's take, and each gives B L D numbers in float32,
which are there twice while they are stacked; the transformer reads them.

A native engine draws the pictures of a batch one after the other, each in the buffers of its plan:
the streams, what a norm gives, Q, K and V, and attention beside the MLP. Inputs are float32 and
there for the whole batch. This is reckoned from the plan, and not measured:

    transformer  e T (6 D + F) + 4 B (M D + T D)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.checkpoint.config import TransformerConfig
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.components.residuals import KINDS, residual_count
from fluxdeploy.kernels import AttentionKernels, CallSizes

if TYPE_CHECKING:
    from exporters.components.component import Networks

__all__ = [
    "clip_bytes",
    "conditioner_bytes",
    "controlnet_bytes",
    "controlnet_conditioner_bytes",
    "controlnet_encoder_bytes",
    "ip_adapter_bytes",
    "ip_adapter_encoder_bytes",
    "redux_bytes",
    "t5_bytes",
    "transformer_bytes",
    "vae_decoder_bytes",
    "vae_encoder_bytes",
]

_SCORES = 3
"""Copies of attention's scores that ONNX Runtime has alive at once."""

_PICTURE = 6
"""Tensors of the full resolution that ONNX Runtime has alive at once in the VAE."""

_MYELIN = 12_000_000
"""Bytes that TensorRT's fused blocks take at any size."""


def transformer_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of the MM-DiT without its conditioner; `element` are the bytes of its compute type."""
    residuals = sum(residual_count(networks.controlnets, kind) for kind in KINDS)
    added = 4 * sizes.batch * residuals * sizes.image * networks.transformer.width
    seen = _seen_bytes(networks, sizes)
    return _blocks_bytes(networks.transformer, sizes, kernels, element) + added + seen


def ip_adapter_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of an IP-Adapter: what it gives, once each block and stacked."""
    adapter = networks.ip_adapter
    assert adapter is not None  # or there is no such component
    given = 4 * sizes.batch * adapter.tokens * adapter.width
    return 2 * 2 * adapter.blocks * given


def ip_adapter_encoder_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of the encoder of its pictures, whose tokens are always as many."""
    config = networks.ip_adapter_encoder
    assert config is not None  # or there is no such component
    widths = (config.width, config.mlp_width, config.heads)
    return _encoder_bytes(sizes.batch, config.tokens, widths, kernels, element)


def _seen_bytes(networks: Networks, sizes: CallSizes) -> int:
    """What the transformer takes for an IP-Adapter: keys and values, and the scores of a block."""
    adapter, config = networks.ip_adapter, networks.transformer
    if adapter is None:
        return 0
    given = 2 * adapter.blocks * adapter.tokens * config.width
    scores = _SCORES * config.width // config.head_dim * sizes.image * adapter.tokens
    return 4 * sizes.batch * (given + scores + 2 * sizes.image * config.width)


def controlnet_bytes(
    number: int, networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of a ControlNet's blocks, and of what they give: once each, and stacked."""
    config = networks.controlnets[number]
    blocks = config.double_blocks + config.single_blocks
    given = 4 * sizes.batch * blocks * sizes.image * config.width
    return _blocks_bytes(config, sizes, kernels, element) + 2 * given


def _blocks_bytes(
    config: TransformerConfig | ControlNetConfig,
    sizes: CallSizes,
    kernels: AttentionKernels,
    element: int,
) -> int:
    tokens = sizes.text + sizes.image
    if kernels is AttentionKernels.ONNX_RUNTIME:
        return 4 * sizes.batch * tokens * (14 * config.width + 2 * config.mlp_width)
    if kernels is AttentionKernels.TENSORRT:
        token = element * (13 * config.width + 2 * config.mlp_width)
        return sizes.batch * tokens * token + _MYELIN
    if kernels is AttentionKernels.NATIVE:
        buffers = element * tokens * (6 * config.width + config.mlp_width)
        return buffers + 4 * sizes.batch * config.width * (config.modulation_rows + tokens)
    heads = config.width // config.head_dim
    streams = tokens * (5 * config.width + config.mlp_width)
    return 4 * sizes.batch * (streams + _SCORES * heads * tokens**2)


def conditioner_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of the conditioner, whose rows of modulation are in float32 whatever it computes in."""
    return _conditioner_bytes(networks.transformer, sizes, kernels)


def controlnet_conditioner_bytes(
    number: int, networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of a ControlNet's conditioner, as the transformer's."""
    return _conditioner_bytes(networks.controlnets[number], sizes, kernels)


def controlnet_encoder_bytes(
    number: int, networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of a ControlNet's convolutions, which begin at the full resolution."""
    channels = max(networks.controlnets[number].hint_channels)
    pixels = networks.transformer.patch_size**2 * sizes.image * networks.vae.spatial_factor**2
    return 4 * _PICTURE * channels * pixels


def _conditioner_bytes(
    config: TransformerConfig | ControlNetConfig, sizes: CallSizes, kernels: AttentionKernels
) -> int:
    batch = sizes.batch
    rows = sizes.steps * batch * config.modulation_rows * config.width
    text = batch * sizes.text * (config.text_width + config.width)
    return 4 * ((4 if kernels is AttentionKernels.TENSORRT else 3) * rows + text)


def t5_bytes(networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int) -> int:
    """Of T5, with its position bias."""
    t5 = networks.t5
    widths = (t5.d_model, t5.d_ff, t5.num_heads)
    bias: int = 4 * t5.num_heads * sizes.text**2
    return _encoder_bytes(sizes.batch, sizes.text, widths, kernels, element) + bias


def clip_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of CLIP, whose text always has all of its positions."""
    clip = networks.clip
    widths = (clip.hidden_size, clip.intermediate_size, clip.num_attention_heads)
    return _encoder_bytes(sizes.batch, clip.max_position_embeddings, widths, kernels, element)


def redux_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of a Redux's SigLIP, one picture at a time; the linears after it take less."""
    assert networks.redux is not None
    encoder = networks.redux.encoder
    widths = (encoder.width, encoder.mlp_width, encoder.heads)
    return _encoder_bytes(1, encoder.tokens, widths, kernels, element)


def _encoder_bytes(
    batch: int, tokens: int, widths: tuple[int, int, int], kernels: AttentionKernels, element: int
) -> int:
    """Of an encoder of some width, MLP width and heads."""
    width, mlp_width, heads = widths
    scores = heads * tokens**2
    streams = tokens * (6 * width + 3 * mlp_width)
    if kernels is AttentionKernels.TENSORRT:
        return batch * ((4 + element) * scores + element * streams)
    return 4 * batch * (_SCORES * scores + streams)


def vae_decoder_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of the decoder, which enters its last level with the channels of the one before."""
    channels = networks.vae.channels
    return _vae_bytes(networks, channels[min(1, len(channels) - 1)], sizes, kernels, element)


def vae_encoder_bytes(
    networks: Networks, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of the encoder."""
    return _vae_bytes(networks, networks.vae.channels[0], sizes, kernels, element)


def _vae_bytes(
    networks: Networks, channels: int, sizes: CallSizes, kernels: AttentionKernels, element: int
) -> int:
    """Of one picture: they go through the VAE one at a time."""
    latents = networks.transformer.patch_size**2 * sizes.image
    pixels = latents * networks.vae.spatial_factor**2
    if kernels is AttentionKernels.TENSORRT:
        return (4 + 3 * element) * channels * pixels
    streams = 4 * _PICTURE * channels * pixels
    if kernels is AttentionKernels.ONNX_RUNTIME:
        return streams
    return max(streams, 4 * _SCORES * latents**2)
