"""The arguments of a generation, checked before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluxdeploy.arguments import check_integer, check_number, shown
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import check_range
from fluxdeploy.host.course import check_sigmas, check_skip
from fluxdeploy.sampling.latents import check_size, latent_shape, token_grid
from fluxdeploy.sampling.noise import check_seed
from fluxdeploy.sampling.sampler import load_sampler
from fluxdeploy.sampling.skipping import Skips
from fluxdeploy.text.tokenizer import check_prompt

__all__ = ["GenerationRequest", "as_latents", "check_request", "idle_arguments"]

_MAX_SCALE = 1e6
"""Of guidance, either way: it is a number around 3, and float32 has an end."""

_MAX_PICTURES = 1000
"""Of a call: their pixels are in memory until it ends, 12 MB of each at 1024x1024."""

_MAX_PROMPT = 100_000
"""Characters of a prompt: 512 tokens are some 3,000, and reading a million takes seconds."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, defaults filled in: for each prompt, `num_images_per_prompt` pictures.

    `negative_prompts` holds one for each prompt, or is None where true CFG is off. `latents` are
    the caller's, float32 [B, L, C], packed; where it is None there is a seed, and else none.
    `sigmas` are the caller's noise levels before shifting, float32 [N]. `skip` counts the steps of
    the whole schedule.
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
    sampler: str = "euler"
    sigmas: NDArray[np.float32] | None = field(default=None, compare=False)
    skip: Skips | None = None

    @property
    def batch(self) -> int:
        """B: the number of pictures."""
        return len(self.prompts) * self.num_images_per_prompt

    def engine_sizes(self, manifest: Manifest, levels: int) -> dict[str, dict[str, int]]:
        """What each component is asked for: its sizes by the symbols of the manifest.

        A batch is none of them: one that is too large for an engine runs in parts.

        levels: the noise levels at which the velocity is taken. The VAE decoder comes first: of all
        ranges that a size can miss, its are the clearest, since they are in pixels.
        """
        rows, columns = token_grid(self.height, self.width, manifest.latents)
        _, _, h, w = latent_shape(1, self.height, self.width, manifest.latents)
        text, tokens = self.max_sequence_length, rows * columns
        return {
            "vae_decoder": {"H": self.height, "W": self.width, "h": h, "w": w},
            "transformer": {"L": tokens, "S": text, "T": text + tokens},
            "conditioner": {"S": text, "N": levels},
            "t5": {"S": text},
            "clip": {},
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
    sampler: str = "euler",
    sigmas: ArrayLike | None = None,
    skip: object = "none",
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
    scale = check_number("true_cfg_scale", true_cfg_scale, -_MAX_SCALE, _MAX_SCALE)
    load_sampler(sampler)
    levels = None if sigmas is None else check_sigmas(sigmas, num_inference_steps)
    if levels is not None:
        num_inference_steps = len(levels)
    if num_inference_steps is None:
        num_inference_steps = defaults.num_inference_steps
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale
    height = check_integer("height", defaults.height if height is None else height, None)
    width = check_integer("width", defaults.width if width is None else width, None)
    check_size(height, width, manifest.latents)
    images_each = check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    if seed is not None:
        check_seed(seed)
    t5 = manifest.tokenizers["t5"]
    steps = check_integer("num_inference_steps", num_inference_steps, 1)
    request = GenerationRequest(
        prompts=prompts,
        negative_prompts=negative_prompts if scale > 1 else None,
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=check_number("guidance_scale", guidance_scale, -_MAX_SCALE, _MAX_SCALE),
        num_images_per_prompt=images_each,
        max_sequence_length=check_integer(
            "max_sequence_length",
            defaults.max_sequence_length if max_sequence_length is None else max_sequence_length,
            max(1, len(t5.prefix) + len(t5.suffix)),
            t5.max_length,
        ),
        seed=None if seed is None or latents is not None else int(seed),
        latents=None,
        sampler=sampler,
        sigmas=levels,
        skip=check_skip(skip, manifest, sampler, steps, levels is None),
    )
    if request.batch > _MAX_PICTURES:
        raise UsageError(
            f"{shown(request.batch)} pictures are too many for one call, which makes at most "
            f"{_MAX_PICTURES}. Make several calls."
        )
    _check_ranges(manifest, request.engine_sizes(manifest, request.num_inference_steps))
    if latents is None:
        return request
    # After the ranges, so that what memory cannot hold is never made.
    return replace(request, latents=_latents(latents, manifest, request))


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


def _check_ranges(manifest: Manifest, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse what no engine of a component takes, before memory is asked for it.

    The engine that is opened may take less, which is known once it is.
    """
    for component, symbols in sizes.items():
        record = manifest.components.get(component)
        ranges = [] if record is None else [engine.dimensions for engine in record.engines]
        for symbol, size in symbols.items():
            allowed = [each[symbol] for each in ranges if symbol in each]
            if allowed and not any(each.min <= size <= each.max for each in allowed):
                check_range(component, symbol, size, allowed[0])


def as_latents(values: object) -> NDArray[np.float32] | None:
    """A copy of numbers as a float32 array; None for what is no array of numbers.

    What has more digits or a larger range is rounded, to infinity where it must.
    """
    try:
        with np.errstate(over="ignore"), warnings.catch_warnings():
            # NumPy's of ragged lists, and those of other libraries' arrays.
            warnings.simplefilter("ignore")
            array = np.asarray(values)
            if array.dtype.kind not in "iuf":
                return None
            return np.array(array, np.float32, order="C")
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - an array is anything that says it is one
        return None


def _latents(latents: object, manifest: Manifest, request: GenerationRequest) -> Any:
    """A copy of the caller's packed latents, float32 [B, L, C]."""
    spec = manifest.latents
    rows, columns = token_grid(request.height, request.width, spec)
    expected = (request.batch, rows * columns, spec.channels * spec.patch_size**2)
    own = as_latents(latents)
    if own is None:
        raise UsageError(
            f"`latents` must be an array of numbers {list(expected)}, packed, not {shown(latents)}."
        )
    if own.shape != expected:
        raise UsageError(
            f"`latents` has shape {list(own.shape)}; for {request.batch} pictures of "
            f"{request.width}x{request.height} pixels it must be {list(expected)}, packed."
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
        raise UsageError(
            f"`{name}` must be a string or a list of at least one string, not {shown(value)}."
        )
    for prompt in prompts:
        if len(prompt) > _MAX_PROMPT:
            raise UsageError(
                f"`{name}` has {len(prompt)} characters; it must have at most {_MAX_PROMPT}, of "
                "which the text encoders read a few hundred words."
            )
        check_prompt(prompt)
    # Of a subclass, the text alone.
    return tuple(str.__str__(prompt) for prompt in prompts)
