"""How a picture becomes what an image encoder reads: its record in the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from fluxdeploy.bundle.typed_json import FieldError, join

__all__ = ["FILTERS", "PixelSpec", "check_pixels"]

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""What `PixelSpec.filter` may be: Pillow's, by their numbers there."""

_MOST_SIDE = 4096
_LARGE = 1e6


@dataclass(frozen=True)
class PixelSpec:
    """What the image processors of transformers do.

    A picture is resized with `filter` to `resize`: [height, width], or [side], the shorter one's.
    Then `crop`, [height, width], is cut from its middle; null where all of it is kept. A value v of
    0 to 255 becomes (v · scale - mean) / std, with a mean and a deviation for each colour.
    """

    resize: tuple[int, ...]
    crop: tuple[int, ...] | None
    filter: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of what comes out."""
        return self.resize if self.crop is None else self.crop


def check_pixels(spec: PixelSpec, where: str) -> None:
    """Raise `FieldError` for what makes no pixels, or pixels of no known size."""
    lists = {"resize": (spec.resize, (1, 2)), "mean": (spec.mean, (3,)), "std": (spec.std, (3,))}
    if spec.crop is not None:
        lists["crop"] = (spec.crop, (2,))
    for name, (numbers, counts) in lists.items():
        if len(numbers) not in counts:
            allowed = " or ".join(map(str, counts))
            raise FieldError(
                join(where, name), f"has {len(numbers)} numbers; {allowed} are allowed"
            )
    for side in (*spec.resize, *(spec.crop or ())):
        if not 0 < side <= _MOST_SIDE:
            raise FieldError(where, f"has a side of {side}; it is 1 to {_MOST_SIDE}")
    if len(spec.size) != 2:
        raise FieldError(
            where, "resizes to a shorter side and crops nothing: its size is not known"
        )
    # Of a shorter side alone, both are at least that long.
    kept = spec.resize if len(spec.resize) == 2 else spec.resize * 2
    if any(crop > side for crop, side in zip(spec.size, kept, strict=True)):
        raise FieldError(join(where, "crop"), "is larger than what it is cut from")
    if spec.filter not in FILTERS:
        raise FieldError(
            join(where, "filter"), f"is {spec.filter!r}; it must be one of {', '.join(FILTERS)}"
        )
    for name, value in (("scale", spec.scale), *(("std", each) for each in spec.std)):
        if not 1 / _LARGE <= value <= _LARGE:
            raise FieldError(
                join(where, name), f"is {value:g}; it must be from {1 / _LARGE:g} to {_LARGE:g}"
            )
    for value in spec.mean:
        if not -_LARGE <= value <= _LARGE:
            raise FieldError(join(where, "mean"), f"has {value:g}; it is at most {_LARGE:g}")
