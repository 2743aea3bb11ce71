"""Trained networks as a checkpoint in diffusers layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from exporters.synthetic.sparse_checkpoint import MODEL_INDEX
from exporters.training.few_steps import SHIFT
from exporters.training.networks import TEXT_LENGTH, TextEncoders

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: Path,
    tokenizers: Path,
    vae: AutoencoderKL,
    text: TextEncoders,
    transformer: FluxTransformer2DModel,
    settings: Mapping[str, Any],
) -> None:
    """Write all parts in bfloat16. `settings` are the checkpoint's own defaults for a picture."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text.clip}
    parts["text_encoder_2"] = text.t5
    for name, part in parts.items():
        part.to(torch.bfloat16).save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, folder / name)
    FlowMatchEulerDiscreteScheduler(
        shift=SHIFT,
        use_dynamic_shifting=bool(transformer.config.guidance_embeds),
        base_shift=1.2,
        max_shift=1.4,
        base_image_seq_len=36,
        max_image_seq_len=100,
    ).save_pretrained(folder / "scheduler")
    defaults = {"height": 128, "width": 128, "max_sequence_length": TEXT_LENGTH, **settings}
    index = {**MODEL_INDEX, "_fluxdeploy": defaults}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
