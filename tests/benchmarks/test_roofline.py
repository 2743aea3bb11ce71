"""The operations that roofline figures stand on, against PyTorch's own count."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Peaks, count_step, least_seconds
from exporters.checkpoint.config import TransformerConfig

CONFIG = TransformerConfig(
    in_channels=64,
    out_channels=64,
    width=96,
    head_dim=32,
    mlp_width=384,
    double_blocks=2,
    single_blocks=3,
    text_width=48,
    pooled_width=40,
    guidance_embedding=False,
    axes_dims=(8, 12, 12),
    theta=10000.0,
)
IMAGE, TEXT = 24, 10


def test_operations_are_those_that_pytorch_counts() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=48,
            pooled_projection_dim=40,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        inputs = {
            "hidden_states": torch.zeros(1, IMAGE, 64),
            "encoder_hidden_states": torch.zeros(1, TEXT, 48),
            "pooled_projections": torch.zeros(1, 40),
            "timestep": torch.zeros(1),
            "img_ids": torch.zeros(IMAGE, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        }
        counter = FlopCounterMode(display=False)
        with counter:
            model(**inputs)
    work = count_step(CONFIG, IMAGE, TEXT)
    # What the conditioner does: the text's projection, embeddings, and AdaLN's linears.
    adaln = 96 * 96 * (2 * 12 + 3 * 3 + 2)
    embeddings = 96 * (256 + 96) + 96 * (40 + 96)
    conditioner = 2 * (TEXT * 48 * 96 + adaln + embeddings)
    assert work.linears + work.attention + conditioner == counter.get_total_flops()


def test_weights_are_those_of_the_blocks_and_of_the_ends() -> None:
    assert count_step(CONFIG, IMAGE, TEXT).weights == (2 * 2 + 3) * 12 * 96 * 96 + 2 * 64 * 96


def test_the_slower_of_products_and_reading_counts() -> None:
    work = count_step(CONFIG, IMAGE, TEXT)
    products = least_seconds(work, "bf16", Peaks({"bf16": 1e9}, 1e30))
    assert products == (work.linears + work.attention) / 1e9
    assert least_seconds(work, "bf16", Peaks({"bf16": 1e30}, 1e6)) == 2 * work.weights / 1e6
    assert least_seconds(work, "fp8", Peaks({"bf16": 1e9}, 1e9)) is None
