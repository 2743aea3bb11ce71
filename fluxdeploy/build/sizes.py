"""Which sizes an engine is built for: the ranges of its symbols, and its resolution buckets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fluxdeploy.bundle.manifest import Defaults, DimensionRange, LatentSpec
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.errors import UsageError

__all__ = [
    "LONGEST_SIDE",
    "MOST_RANK",
    "MOST_SEEN",
    "MOST_STEPS",
    "MOST_TEXT",
    "SizeRange",
    "any_size",
    "overall",
    "resolution_buckets",
]

MOST_TEXT = 4096
"""Text tokens that a checkpoint may record: T5's attention takes their square."""
MOST_STEPS = 1000
MOST_RANK = 1024
"""Of the LoRAs of a call."""
LONGEST_SIDE = 4096
"""Pixels of a picture's side."""
MOST_SEEN = 256
"""Tokens of the pictures that an IP-Adapter is given at once: 16 of 16 tokens."""
_USUAL_SEEN = 16
_LEAST_TEXT = 64
_USUAL_TEXT = 512
_LEAST_SIDE = 64
"""TensorRT fuses attention only where the joint sequence has no fewer than about 32 tokens."""
_NARROW = 1024
"""Image tokens up to which one bucket is enough: a step is over in no time anyway."""

Profile = Mapping[str, DimensionRange]


@dataclass(frozen=True)
class SizeRange:
    """The pictures that engines are to draw: heights and widths in pixels, and pictures a call.

    None leaves a size to the checkpoint: its own size as `opt`, a quarter of each side, but no less
    than 64 pixels, as `min`, and twice as `max`.
    """

    min: tuple[int, int] | None = None
    opt: tuple[int, int] | None = None
    max: tuple[int, int] | None = None
    batch: int = 1


def any_size(
    symbols: set[str],
    defaults: Defaults,
    latents: LatentSpec,
    rank: int = 0,
    references: int = 0,
    picture_text: int = 0,
) -> dict[str, DimensionRange]:
    """What a runtime without profiles takes: up to where attention fills any machine's memory.

    rank: of the LoRAs that a call may have. references: pictures of the usual size whose tokens the
    transformer reads behind those of the picture. picture_text: text tokens of pictures that it
    reads behind those of a prompt.
    """
    step = latents.token_side
    most = (1 + references) * (LONGEST_SIDE // step) ** 2
    image = (1 + references) * (defaults.height // step) * (defaults.width // step)
    sides = {
        "H": DimensionRange(step, defaults.height, LONGEST_SIDE),
        "W": DimensionRange(step, defaults.width, LONGEST_SIDE),
    }
    text = _text(1, defaults, picture_text)
    ranges = _ranges(DimensionRange(1, image, most), text, sides, 64, defaults, latents, rank)
    return {symbol: ranges[symbol] for symbol in sorted(symbols)}


def resolution_buckets(
    symbols: set[str],
    sizes: SizeRange,
    defaults: Defaults,
    latents: LatentSpec,
    rank: int = 0,
    references: int = 0,
    picture_text: int = 0,
) -> tuple[Profile, ...]:
    """The optimization profiles of an engine with these symbols, smallest pictures first.

    A bucket reaches to four times the tokens that it begins with, and is tuned for its largest:
    kernels for a range of sizes are the slower the wider it is. One of the borders is the size that
    the engine is tuned for most; small pictures share a bucket. Components that do not see the
    picture have one profile. With `references` the transformer reads the tokens of as many pictures
    more, with `picture_text` as many text tokens more, and less where a call has none.

    Raises `UsageError` for sizes that are not whole tokens or not in order.
    """
    least, opt, most = _checked(sizes, defaults, latents)
    step = latents.token_side
    tokens = [(height // step) * (width // step) for height, width in (least, opt, most)]
    tokens[1:] = [(1 + references) * count for count in tokens[1:]]
    if "L" in symbols:
        spans = _buckets(*tokens)
    else:
        spans = [DimensionRange(*tokens)]
    short, long = min(*least, *opt), max(*most, *opt)
    sides = {
        "H": DimensionRange(short, opt[0], long),
        "W": DimensionRange(short, opt[1], long),
    }
    text = _text(min(defaults.max_sequence_length, _LEAST_TEXT), defaults, picture_text)
    profiles = []
    for span in spans:
        ranges = _ranges(span, text, sides, sizes.batch, defaults, latents, rank)
        profiles.append({symbol: ranges[symbol] for symbol in sorted(symbols)})
    return tuple(profiles)


def overall(profiles: tuple[Profile, ...]) -> dict[str, DimensionRange]:
    """The sizes that some profile takes; `opt` is the last profile's."""
    last = profiles[-1]
    return {
        symbol: DimensionRange(
            min(profile[symbol].min for profile in profiles),
            last[symbol].opt,
            max(profile[symbol].max for profile in profiles),
        )
        for symbol in last
    }


def _text(least: int, defaults: Defaults, more: int) -> DimensionRange:
    """The text tokens of prompts, with or without so many more."""
    usual = defaults.max_sequence_length
    return DimensionRange(least, usual + more, max(usual, _USUAL_TEXT) + more)


def _ranges(
    image: DimensionRange,
    text: DimensionRange,
    sides: Mapping[str, DimensionRange],
    batch: int,
    defaults: Defaults,
    latents: LatentSpec,
    rank: int,
) -> dict[str, DimensionRange]:
    """Every symbol's range, given those of image and text tokens and of the picture's sides."""
    ranges = {
        "B": DimensionRange(1, 1, batch),
        "S": text,
        "L": image,
        "T": DimensionRange(text.min + image.min, text.opt + image.opt, text.max + image.max),
        # Where nothing is seen there is one token of zeros.
        "V": DimensionRange(1, _USUAL_SEEN, MOST_SEEN),
        "N": DimensionRange(1, defaults.num_inference_steps, MOST_STEPS),
        # Without a LoRA there is one of zeros.
        RANK: DimensionRange(1, max(rank, 1), max(rank, 1)),
        **sides,
    }
    factor = latents.spatial_factor
    for symbol, side in (("h", "H"), ("w", "W")):
        pixels = sides[side]
        ranges[symbol] = DimensionRange(
            pixels.min // factor, pixels.opt // factor, pixels.max // factor
        )
    return ranges


def _buckets(least: int, opt: int, most: int) -> list[DimensionRange]:
    borders = set()
    border = opt
    while border > least:
        borders.add(border)
        border //= 4
    border = opt
    while border < most:
        borders.add(border)
        border *= 4
    inner = {border for border in borders if least < border < most and border >= _NARROW}
    ordered = sorted({least, most, *inner})
    if len(ordered) == 1:
        return [DimensionRange(least, least, least)]
    return [
        DimensionRange(low, opt if low < opt < high else high, high)
        for low, high in itertools.pairwise(ordered)
    ]


def _checked(
    sizes: SizeRange, defaults: Defaults, latents: LatentSpec
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    step = latents.token_side
    opt = sizes.opt or (defaults.height, defaults.width)

    def scaled(factor: float) -> tuple[int, int]:
        height, width = (max(step, round(side * factor / step) * step) for side in opt)
        return height, width

    height, width = (
        min(side, max(_LEAST_SIDE, quarter))
        for side, quarter in zip(opt, scaled(1 / 4), strict=True)
    )
    least, most = sizes.min or (height, width), sizes.max or scaled(2)
    for name, size in (("--opt-size", opt), ("--min-size", least), ("--max-size", most)):
        if any(side < step or side % step for side in size):
            raise UsageError(
                f"{name} is {size[1]}x{size[0]}; width and height must be multiples of {step}."
            )
    areas = [math.prod(size) for size in (least, opt, most)]
    if areas != sorted(areas):
        raise UsageError(
            f"--min-size {least[1]}x{least[0]}, --opt-size {opt[1]}x{opt[0]} and --max-size "
            f"{most[1]}x{most[0]} must not get smaller from one to the next."
        )
    if sizes.batch < 1:
        raise UsageError(f"--max-batch is {sizes.batch}; it must be at least 1.")
    return least, opt, most
