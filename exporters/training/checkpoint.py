"""Trained networks as a checkpoint in diffusers layout, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file

from exporters.synthetic.small_tokenizers import TokenizerSizes
from exporters.synthetic.sparse_checkpoint import MODEL_INDEX
from exporters.training.few_steps import SHIFT
from exporters.training.networks import TEXT_LENGTH, TextEncoders

__all__ = ["read_checkpoint", "write_checkpoint"]


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


def read_checkpoint(
    checkpoint: Path,
) -> tuple[FluxTransformer2DModel, TextEncoders, AutoencoderKL]:
    """The networks of a checkpoint that `write_checkpoint` wrote, in float32 and not training."""

    def config(name: str) -> Any:
        return json.loads((checkpoint / name / "config.json").read_text())

    clip, t5 = config("text_encoder"), config("text_encoder_2")
    sizes = TokenizerSizes(
        clip["vocab_size"], clip["bos_token_id"], clip["eos_token_id"], t5["vocab_size"]
    )
    text = TextEncoders(checkpoint, sizes)
    for part, name in ((text.clip, "text_encoder"), (text.t5, "text_encoder_2")):
        state = load_file(checkpoint / name / "model.safetensors")
        # T5 writes one table for the two names that it has for it.
        part.load_state_dict(state, strict=False)
        for key, values in state.items():
            torch.testing.assert_close(part.state_dict()[key], values.float())
    transformer = FluxTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    return transformer.float(), text.eval().requires_grad_(False), vae.float().eval()
