"""A grid: a picture for each value of an option, or for each pair of two options' values."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxdeploy.arguments import shown
from fluxdeploy.batch.order import Order
from fluxdeploy.batch.plan import Request
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pictures import check_picture_path
from fluxdeploy.sampling.noise import check_seed

__all__ = ["AXES", "Axis", "Grid", "make_grid", "parse_axis"]

_MOST_PICTURES = 100
"""Of a sheet: what can still be looked at."""

_PROMPT = "prompt"


@dataclass(frozen=True)
class _Kind:
    """field: of an `Order`. read: a value from its text, raising `ValueError`. what: in words."""

    field: str
    read: Callable[[str], Any]
    what: str


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_KINDS: Mapping[str, _Kind] = {
    "steps": _Kind("num_inference_steps", int, "an integer"),
    "seed": _Kind("seed", int, "an integer"),
    "guidance": _Kind("guidance_scale", _number, "a number"),
    "true-cfg-scale": _Kind("true_cfg_scale", _number, "a number"),
    "strength": _Kind("strength", _number, "a number"),
    "sampler": _Kind("sampler", str, "a name"),
}

AXES = tuple(_KINDS)
"""What a grid goes over, by the names of the options."""


@dataclass(frozen=True)
class Axis:
    """The values of one side of a grid: of an option, or the prompts."""

    name: str
    values: tuple[Any, ...]

    @property
    def field(self) -> str:
        """What an `Order` calls it."""
        return _PROMPT if self.name == _PROMPT else _KINDS[self.name].field

    @property
    def labels(self) -> list[str]:
        """What stands beside the pictures, for each value."""
        if self.name == _PROMPT:
            return list(self.values)
        return [f"{self.name.replace('-', ' ')} {_plain(value)}" for value in self.values]

    @property
    def endings(self) -> list[str]:
        """What a picture's name ends in, for each value."""
        if self.name == _PROMPT:
            return [f"-{number}" for number in range(len(self.values))]
        return [f"-{self.name}{_plain(value)}" for value in self.values]


@dataclass(frozen=True)
class Grid:
    """axes: what goes down, if anything, and what goes across. requests: row by row."""

    axes: tuple[Axis, ...]
    requests: list[Request]

    @property
    def rows(self) -> list[str]:
        """The labels of the rows; one that is empty, where there is one axis."""
        return self.axes[0].labels if len(self.axes) > 1 else [""]

    @property
    def columns(self) -> list[str]:
        """The labels of the columns."""
        return self.axes[-1].labels


def parse_axis(text: str) -> Axis:
    """The axis that `--grid NAME=VALUE,VALUE,...` means. Raises `UsageError`."""
    name, separator, values = text.partition("=")
    name = name.strip()
    if not separator or name not in _KINDS:
        given = shown(name)[1:-1]
        raise UsageError(
            f"{'A grid has no axis' if separator else 'An axis is NAME=VALUE,VALUE,..., not'} "
            f"`{given}`. There are {', '.join(AXES)}: for example steps=4,8,28."
        )
    kind, found = _KINDS[name], []
    for part in values.split(","):
        try:
            if not part.strip() or len(part) > 40:
                raise ValueError(part)
            value = kind.read(part.strip())
        except ValueError:
            raise UsageError(
                f"The axis `{name}` has {shown(part.strip())}, where {kind.what} must be."
            ) from None
        if value in found:
            raise UsageError(f"The axis `{name}` has {_plain(value)} twice. Leave one out.")
        found.append(value)
    return Axis(name, tuple(found))


def make_grid(
    prompts: Sequence[str], axes: Sequence[Axis], usual: Mapping[str, Any], out: Path
) -> Grid:
    """All requests of a grid, whose pictures are called after `out`.

    Several prompts are an axis too, the first. usual: what all pictures have that no axis says;
    `seed` is a tuple of one, or None for a random one. Raises `UsageError` for what makes no grid.
    """
    check_picture_path(out)
    if len(prompts) > 1:
        axes = [Axis(_PROMPT, tuple(prompts)), *axes]
    _check_axes(axes)
    names = {axis.field for axis in axes}
    if "strength" in names and not usual["image"]:
        raise UsageError("The axis `strength` needs --image.")
    if usual["num_images_per_prompt"] != 1:
        raise UsageError("A grid has one picture in each place: leave out --num-images.")
    seeds = usual["seed"] or (int.from_bytes(os.urandom(4), "little"),)
    if len(seeds) > 1:
        raise UsageError(
            f"Several seeds are an axis of a grid: --grid seed={','.join(map(str, seeds))}."
        )
    for seed in (*seeds, *(seed for axis in axes if axis.name == "seed" for seed in axis.values)):
        check_seed(seed)
    shared = {**usual, "prompt": prompts[0], "seed": seeds[0]}
    requests = []
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        order = Order(**{**shared, **{axis.field: axis.values[at] for axis, at in chosen}})
        ending = "".join(axis.endings[at] for axis, at in chosen)
        requests.append(Request("", order, (out.with_name(f"{out.stem}{ending}{out.suffix}"),)))
    return Grid(tuple(axes), requests)


def _check_axes(axes: Sequence[Axis]) -> None:
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"The axis `{name}` is given twice. Give it once, with all its values."
            )
    if len(axes) > 2:
        prompts = " Several prompts are one of them." if _PROMPT in names else ""
        raise UsageError(
            f"A grid has two axes at most, not {len(axes)}: {', '.join(names)}.{prompts}"
        )
    count = math.prod(len(axis.values) for axis in axes)
    if count > _MOST_PICTURES:
        raise UsageError(
            f"This grid has {count} pictures; {_MOST_PICTURES} are the most. Give fewer values."
        )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
