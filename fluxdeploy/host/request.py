"""The arguments of a generation, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.latents import check_size, latent_shape, token_grid
from fluxdeploy.sampling.noise import check_seed

__all__ = ["GenerationRequest", "check_number", "check_request", "idle_arguments"]


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, defaults filled in: for each prompt, `num_images_per_prompt` pictures.

    `negative_prompts` holds one for each prompt, or is None where true CFG is off. `latents` are
    the caller's, float32 [B, L, C], packed; where it is None there is a seed, and else none.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    true_cfg_scale: float
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    max_sequence_length: int
    seed: int | None
    latents: NDArray[np.float32] | None = field(compare=False)

    @property
    def batch(self) -> int:
        """B: the number of pictures."""
        return len(self.prompts) * self.num_images_per_prompt

    def engine_sizes(self, manifest: Manifest, levels: int) -> dict[str, dict[str, int]]:
        """What each component is asked for: its sizes by the symbols of the manifest.

        levels: the noise levels at which the velocity is taken. The VAE decoder comes first: of all
        ranges that a size can miss, its are the clearest, since they are in pixels.
        """
        rows, columns = token_grid(self.height, self.width, manifest.latents)
        _, _, h, w = latent_shape(1, self.height, self.width, manifest.latents)
        text, tokens = self.max_sequence_length, rows * columns
        # A prompt that occurs twice is encoded once.
        encoded = max(len(set(self.prompts)), len(set(self.negative_prompts or ())))
        return {
            "vae_decoder": {"B": 1, "H": self.height, "W": self.width, "h": h, "w": w},
            "transformer": {"B": self.batch, "L": tokens, "S": text, "T": text + tokens},
            "conditioner": {"B": encoded, "S": text, "N": levels},
            "t5": {"B": encoded, "S": text},
            "clip": {"B": encoded},
        }


def check_request(
    manifest: Manifest,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    true_cfg_scale: float,
    height: int | None,
    width: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    num_images_per_prompt: int,
    max_sequence_length: int | None,
    seed: int | None,
    latents: ArrayLike | None,
) -> GenerationRequest:
    """The request that the arguments of `FluxPipeline.__call__` make.

    One of `seed` and `latents` must be given; latents leave the seed without a use. Raises
    `UsageError` for a value of the wrong kind or outside its range.
    """
    defaults = manifest.defaults
    prompts = _prompts("prompt", prompt)
    negative_prompts = None
    if negative_prompt is not None:
        negative_prompts = _prompts("negative_prompt", negative_prompt)
        if isinstance(negative_prompt, str):
            negative_prompts = negative_prompts * len(prompts)
        if len(negative_prompts) != len(prompts):
            raise UsageError(
                f"There are {len(negative_prompts)} negative prompts for {len(prompts)} prompts. "
                "Give one for all, or one for each."
            )
    scale = check_number("true_cfg_scale", true_cfg_scale)
    if num_inference_steps is None:
        num_inference_steps = defaults.num_inference_steps
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale
    height = _integer("height", defaults.height if height is None else height)
    width = _integer("width", defaults.width if width is None else width)
    check_size(height, width, manifest.latents)
    images_each = _count("num_images_per_prompt", num_images_per_prompt)
    if seed is not None:
        check_seed(seed)
    own = None
    if latents is not None:
        own = _latents(latents, manifest, len(prompts) * images_each, height, width)
    return GenerationRequest(
        prompts=prompts,
        negative_prompts=negative_prompts if scale > 1 else None,
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=_count("num_inference_steps", num_inference_steps),
        guidance_scale=check_number("guidance_scale", guidance_scale),
        num_images_per_prompt=images_each,
        max_sequence_length=_count(
            "max_sequence_length",
            defaults.max_sequence_length if max_sequence_length is None else max_sequence_length,
            manifest.tokenizers["t5"].max_length,
        ),
        seed=None if seed is None or own is not None else int(seed),
        latents=own,
    )


def idle_arguments(manifest: Manifest, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each of the arguments of `check_request` that does nothing beside the others.

    They have passed that check.
    """
    scale, guidance = arguments["true_cfg_scale"], arguments["guidance_scale"]
    negative = arguments["negative_prompt"]
    notices = []
    if negative is not None and scale <= 1:
        notices.append("`negative_prompt` does nothing unless `true_cfg_scale` is above 1.")
    if negative is None and scale != 1:
        notices.append("`true_cfg_scale` does nothing without `negative_prompt`.")
    if guidance is not None and not manifest.guidance_embedding:
        notices.append(
            "`guidance_scale` does nothing here: this bundle's model has no guidance embedding."
        )
    if arguments["seed"] is not None and arguments["latents"] is not None:
        notices.append("`seed` does nothing beside `latents`.")
    return tuple(notices)


def check_number(name: str, value: object) -> float:
    """A finite number. Raises `UsageError` for anything else."""
    if isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value):
        return float(value)
    raise UsageError(f"`{name}` must be a finite number, not {value!r}.")


def _latents(
    latents: ArrayLike, manifest: Manifest, batch: int, height: int, width: int
) -> NDArray[np.float32]:
    """A copy of the caller's packed latents."""
    spec = manifest.latents
    rows, columns = token_grid(height, width, spec)
    expected = (batch, rows * columns, spec.channels * spec.patch_size**2)
    own = np.array(latents, np.float32, order="C")
    if own.shape != expected:
        raise UsageError(
            f"`latents` has shape {list(own.shape)}; for {batch} pictures of {width}x{height} "
            f"pixels it must be {list(expected)}, packed."
        )
    if not np.isfinite(own).all():
        raise UsageError("`latents` holds NaN or infinity. Give finite values.")
    return own


def _prompts(name: str, value: object) -> tuple[str, ...]:
    prompts = (value,) if isinstance(value, str) else value
    if (
        not isinstance(prompts, (list, tuple))
        or not prompts
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise UsageError(f"`{name}` must be a string or a list of at least one string.")
    return tuple(prompts)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UsageError(f"`{name}` must be an integer, not {value!r}.")
    return int(value)


def _count(name: str, value: object, largest: int | None = None) -> int:
    count = _integer(name, value)
    if count < 1 or (largest is not None and count > largest):
        allowed = "at least 1" if largest is None else f"from 1 to {largest}"
        raise UsageError(f"`{name}` is {count}; it must be {allowed}.")
    return count
