"""The arguments of a generation, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluxdeploy.arguments import check_integer, check_number, shown
from fluxdeploy.bundle.boundary import REDUX
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import check_range
from fluxdeploy.host.course import check_sigmas, check_skip
from fluxdeploy.host.numbers import read_numbers
from fluxdeploy.host.redux import Redux, read_redux
from fluxdeploy.host.texts import Embeddings, Prompts, Text, no_words, read_texts
from fluxdeploy.sampling.latents import check_size, latent_shape, token_grid
from fluxdeploy.sampling.noise import check_seed
from fluxdeploy.sampling.sampler import load_sampler
from fluxdeploy.sampling.skipping import Skips

__all__ = ["GenerationRequest", "check_request", "idle_arguments"]

_MAX_SCALE = 1e6
"""Of guidance, either way: it is a number around 3, and float32 has an end."""

_MAX_PICTURES = 1000
"""Of a call: their pixels are in memory until it ends, 12 MB of each at 1024x1024."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, defaults filled in: for each prompt, `num_images_per_prompt` pictures.

    `negative` holds as many prompts as `text`, or is None where true CFG is off. Prompts become
    `max_sequence_length` tokens, and embeddings have as many. `seed` is one for all pictures, or
    one for each, None beside latents where nothing is drawn. `latents` are the caller's, float32
    [B, L, C], packed.
    `sigmas` are the caller's noise levels before shifting, float32 [N]. `skip` counts the steps of
    the whole schedule. `redux` are pictures that `text` goes with.
    """

    text: Text
    negative: Text | None
    true_cfg_scale: float
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    max_sequence_length: int
    seed: int | tuple[int, ...] | None
    latents: NDArray[np.float32] | None = field(compare=False)
    sampler: str = "euler"
    sigmas: NDArray[np.float32] | None = field(default=None, compare=False)
    skip: Skips | None = None
    redux: Redux | None = None

    @property
    def batch(self) -> int:
        """B: the number of pictures."""
        return len(self.text) * self.num_images_per_prompt

    @property
    def text_tokens(self) -> int:
        """S of what the transformer reads: the tokens of a prompt, and those of pictures."""
        return self.max_sequence_length + (0 if self.redux is None else self.redux.tokens)

    def engine_sizes(self, manifest: Manifest, levels: int) -> dict[str, dict[str, int]]:
        """What each component is asked for: its sizes by the symbols of the manifest.

        A batch is none of them: one that is too large for an engine runs in parts.

        levels: the noise levels at which the velocity is taken. The VAE decoder comes first: of all
        ranges that a size can miss, its are the clearest, since they are in pixels.
        """
        rows, columns = token_grid(self.height, self.width, manifest.latents)
        _, _, h, w = latent_shape(1, self.height, self.width, manifest.latents)
        text, tokens = self.text_tokens, rows * columns
        sizes = {
            "vae_decoder": {"H": self.height, "W": self.width, "h": h, "w": w},
            "transformer": {"L": tokens, "S": text, "T": text + tokens},
            "conditioner": {"S": text, "N": levels},
        }
        if any(isinstance(side, Prompts) for side in (self.text, self.negative)):
            sizes |= {"t5": {"S": self.max_sequence_length}, "clip": {}}
        if self.redux is not None:
            sizes[REDUX] = {}
        return sizes


def check_request(
    manifest: Manifest,
    *,
    prompt: str | Sequence[str] | None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    true_cfg_scale: float = 1.0,
    height: int | None,
    width: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    num_images_per_prompt: int,
    max_sequence_length: int | None,
    seed: int | Sequence[int] | None,
    latents: ArrayLike | None = None,
    prompt_embeds: ArrayLike | None = None,
    pooled_prompt_embeds: ArrayLike | None = None,
    negative_prompt_embeds: ArrayLike | None = None,
    negative_pooled_prompt_embeds: ArrayLike | None = None,
    sampler: str = "euler",
    sigmas: ArrayLike | None = None,
    skip: object = "none",
    redux_image: object | None = None,
    prompt_embeds_scale: object = 1.0,
    pooled_prompt_embeds_scale: object = 1.0,
) -> GenerationRequest:
    """The request that the arguments of `FluxPipeline.__call__` make.

    One of `seed` and `latents` must be given. Raises `UsageError` for a value of the wrong kind or
    outside its range.
    """
    defaults = manifest.defaults
    length = _check_length(manifest, max_sequence_length)
    redux = read_redux(manifest, redux_image, prompt_embeds_scale, pooled_prompt_embeds_scale)
    text, negative = read_texts(
        manifest,
        {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        },
        None if redux is None else no_words(manifest, length),
    )
    scale = check_number("true_cfg_scale", true_cfg_scale, -_MAX_SCALE, _MAX_SCALE)
    negative = negative if scale > 1 else None
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
    seeds = None if seed is None else _seeds(seed, len(text) * images_each)
    steps = check_integer("num_inference_steps", num_inference_steps, 1)
    request = GenerationRequest(
        text=text,
        negative=negative,
        true_cfg_scale=scale,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=check_number("guidance_scale", guidance_scale, -_MAX_SCALE, _MAX_SCALE),
        num_images_per_prompt=images_each,
        max_sequence_length=_text_tokens(text, negative, length),
        seed=seeds,
        latents=None,
        sampler=sampler,
        sigmas=levels,
        skip=check_skip(skip, manifest, sampler, steps, levels is None),
        redux=redux,
    )
    if request.batch > _MAX_PICTURES:
        raise UsageError(
            f"{shown(request.batch)} pictures are too many for one call, which makes at most "
            f"{_MAX_PICTURES}. Make several calls."
        )
    _check_ranges(manifest, request.engine_sizes(manifest, request.num_inference_steps))
    if negative is not None and redux is not None:
        # Which have no pictures behind them.
        words = replace(request, redux=None)
        _check_ranges(manifest, words.engine_sizes(manifest, request.num_inference_steps))
    if latents is None:
        return request
    # After the ranges, so that what memory cannot hold is never made.
    spec = manifest.latents
    rows, columns = token_grid(height, width, spec)
    shape = (request.batch, rows * columns, spec.channels * spec.patch_size**2)
    size = f"packed, for {request.batch} pictures of {width}x{height} pixels"
    return replace(request, latents=read_numbers("latents", latents, shape, size))


def idle_arguments(
    manifest: Manifest, arguments: Mapping[str, Any], drawing: bool
) -> tuple[str, ...]:
    """A sentence for each of the arguments of `check_request` that does nothing beside the others.

    They have passed that check. drawing: whether random numbers are drawn at all.
    """
    scale, guidance = arguments["true_cfg_scale"], arguments["guidance_scale"]
    given = {name for name, value in arguments.items() if value is not None}
    negative = given & {"negative_prompt", "negative_prompt_embeds"}
    notices = []
    if scale <= 1:
        notices += [
            f"`{name}` does nothing unless `true_cfg_scale` is above 1."
            for name in sorted(negative)
        ]
    if not negative and scale != 1:
        notices.append("`true_cfg_scale` does nothing without `negative_prompt`.")
    if "negative_prompt_2" in given and not negative:
        notices.append("`negative_prompt_2` does nothing without `negative_prompt`.")
    words = {"prompt"} if scale <= 1 else {"prompt", "negative_prompt"}
    if "max_sequence_length" in given and "prompt_embeds" in given and not given & words:
        notices.append("`max_sequence_length` does nothing beside `prompt_embeds`.")
    if guidance is not None and not manifest.guidance_embedding:
        notices.append(
            "`guidance_scale` does nothing here: this bundle's model has no guidance embedding."
        )
    if "prompt_2" in given and not given & {"prompt", "prompt_embeds"}:
        notices.append("`prompt_2` does nothing without `prompt`.")
    if "redux_image" not in given:
        notices += [
            f"`{name}` does nothing without `redux_image`."
            for name in ("prompt_embeds_scale", "pooled_prompt_embeds_scale")
            if arguments.get(name, 1.0) != 1
        ]
    if arguments["seed"] is not None and not drawing:
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


def _check_length(manifest: Manifest, given: int | None) -> int:
    """The T5 tokens of a prompt."""
    t5 = manifest.tokenizers["t5"]
    length = manifest.defaults.max_sequence_length if given is None else given
    least = max(1, len(t5.prefix) + len(t5.suffix))
    return check_integer("max_sequence_length", length, least, t5.max_length)


def _text_tokens(text: Text, negative: Text | None, length: int) -> int:
    """S, of which positive and negative text must have as many: they share their positions."""
    sides = [text] if negative is None else [text, negative]
    tokens = [side.text.shape[1] if isinstance(side, Embeddings) else length for side in sides]
    if tokens[0] != tokens[-1]:
        both = all(isinstance(side, Embeddings) for side in sides)
        advice = "" if both else " A prompt has `max_sequence_length` of them."
        raise UsageError(
            f"The text has {tokens[0]} tokens, and the negative text {tokens[1]}. Give as many of "
            f"both.{advice}"
        )
    return tokens[0]


def _seeds(given: object, pictures: int) -> int | tuple[int, ...]:
    """One seed, or one for each picture."""
    if isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim == 1):
        if len(given) != pictures:
            raise UsageError(
                f"There are {len(given)} seeds for {pictures} pictures. Give a list with one for "
                "each, or one integer for all."
            )
        for seed in given:
            check_seed(seed)
        seeds = tuple(int(seed) for seed in given)
        return seeds[0] if len(seeds) == 1 else seeds
    check_seed(given)  # type: ignore[arg-type]
    return int(given)  # type: ignore[call-overload,no-any-return]
