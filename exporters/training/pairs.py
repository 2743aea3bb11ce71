"""Pictures and what the transformer is given beside the prompt to draw them: pairs, encoded once.

A pair is drawn from the seed and its number. Encoding takes longer than drawing, so that the
latents are kept, and every pair is seen several times, each time with other noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from exporters.training.data import SIZES, draw_size, pack
from exporters.training.loop import Draw, save
from exporters.training.vae import encode_images
from fluxdeploy.progress import Progress

__all__ = ["Pair", "PairBatch", "PairSet", "encode_packed", "make_pairs"]

Size = tuple[int, int]

_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Pair:
    """A prompt and three pictures, float32 [3, H, W] in [-1, 1]: the one to draw, and one given.

    mask: [H, W], 1 where to paint; None where the task takes none. marks: what lies where in the
    picture to draw and then in the given one, uint8 [2 L, 6], see `data.labels`; None where it is
    not asked for.
    """

    prompt: str
    wanted: Tensor
    given: Tensor
    mask: Tensor | None = None
    marks: Tensor | None = None


@dataclass(frozen=True)
class PairBatch:
    """B pairs of one size: latents [B, L, 64] wanted and given, masks [B, H, W], prompts, marks."""

    size: Size
    wanted: Tensor
    given: Tensor
    masks: Tensor | None
    prompts: list[str]
    marks: Tensor | None = None


@dataclass(frozen=True)
class PairSet:
    """Tensors `wanted`, `given`, perhaps `mask` and `marks` of N pairs, and prompts, by size."""

    tensors: dict[Size, dict[str, Tensor]]
    prompts: dict[Size, list[str]]

    def batch(self, draw: Draw, count: int, device: torch.device) -> PairBatch:
        """A batch of one size."""
        size = draw_size(draw.scenes)
        chosen = draw.scenes.integers(len(self.prompts[size]), size=count)
        rows = torch.from_numpy(chosen)
        picked = {
            name: tensor[rows].float().to(device) for name, tensor in self.tensors[size].items()
        }
        prompts = [self.prompts[size][index] for index in chosen]
        images = picked["wanted"], picked["given"], picked.get("mask")
        return PairBatch(size, *images, prompts, picked.get("marks"))


def make_pairs(
    sample: Callable[[np.random.Generator, int, int], Pair],
    count: int,
    vae: AutoencoderKL,
    file: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> PairSet:
    """Draw and encode about `count` pairs, in the sizes of `SIZES`; they are kept in `file`."""
    if file.exists():
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        return PairSet(kept["tensors"], kept["prompts"])
    tensors: dict[Size, dict[str, Tensor]] = {}
    prompts: dict[Size, list[str]] = {}
    counts = {size: count * weight // sum(SIZES.values()) for size, weight in SIZES.items()}
    task = progress.task("Drawing and encoding pairs", total=sum(counts.values()))
    for index, (size, number) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, index])
        parts: dict[str, list[Tensor]] = {}
        prompts[size] = []
        for first in range(0, number, _ENCODED_AT_ONCE):
            pairs = [sample(rng, *size) for _ in range(min(_ENCODED_AT_ONCE, number - first))]
            prompts[size] += [pair.prompt for pair in pairs]
            for name in ("wanted", "given"):
                images = torch.stack([getattr(pair, name) for pair in pairs])
                latents = encode_packed(vae, images.to(device))
                parts.setdefault(name, []).append(latents.half().cpu())
            for name in ("mask", "marks"):
                some = [getattr(pair, name) for pair in pairs]
                if some[0] is not None:
                    parts.setdefault(name, []).append(torch.stack(some).to(torch.uint8))
            task.advance(len(pairs))
        tensors[size] = {name: torch.cat(each) for name, each in parts.items()}
    save({"tensors": tensors, "prompts": prompts}, file)
    return PairSet(tensors, prompts)


def encode_packed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Packed and scaled latents [B, L, 64] of images [B, 3, H, W] in [-1, 1]: the mean."""
    latents = pack(encode_images(vae, images))
    scaled: Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled
