"""From prompts, or lines of a file, to jobs: what is wanted, where it goes, and what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdeploy.batch.draw import check_order
from fluxdeploy.batch.index import Index
from fluxdeploy.batch.jobs import Job, find_made, picture_name
from fluxdeploy.batch.lines import Line
from fluxdeploy.batch.order import Order, read_orders
from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.host.pictures import picture_paths
from fluxdeploy.sampling.noise import check_seed

if TYPE_CHECKING:
    from fluxdeploy.host.pipeline import FluxPipeline

__all__ = ["Failed", "Request", "index_path", "make_jobs", "of_lines", "of_prompts"]

_MOST_PICTURES = 1000

Failed = Callable[[str, FluxDeployError], None]
"""Called with the place of an order that cannot be drawn, and why; what it raises ends all."""


@dataclass(frozen=True)
class Request:
    """An order and its files. place: where it stands, for messages; empty on the command line."""

    place: str
    order: Order
    paths: tuple[Path, ...]


def index_path(out: Path) -> Path:
    """The index of a batch whose pictures are called after `out`."""
    return out.with_name(f"{out.stem}.index.jsonl")


def of_prompts(prompts: Sequence[str], usual: Mapping[str, Any], out: Path) -> list[Request]:
    """A request for each prompt and seed, all prompts with the same seeds.

    usual: what all have; `seed` is a tuple of seeds, or None for a random one. Raises `UsageError`
    for `out` and for seeds.
    """
    seeds = usual["seed"] or (int.from_bytes(os.urandom(4), "little"),)
    for seed in seeds:
        check_seed(seed)
    shared = {**usual, "seed": None}
    orders = [Order(**{**shared, "prompt": p, "seed": seed}) for p in prompts for seed in seeds]
    return _requests("", orders, out, several=len(seeds) > 1)


def of_lines(
    lines: Iterable[Line], usual: Mapping[str, Any], out: Path, folder: Path, failed: Failed
) -> list[Request]:
    """A request for each line that can be one.

    Without a name of its own, line 3's picture is `out` with -00003 behind its stem. folder: what
    the files in the lines are relative to. Raises `UsageError` for `out`.
    """
    picture_paths(out, 1)
    requests = []
    places: dict[Path, str] = {}
    for line in lines:
        try:
            if line.problem is not None:
                raise UsageError(line.problem)
            orders, name = read_orders(line.values, usual, folder)
            path = out.with_name(f"{out.stem}-{line.number:05}{out.suffix}")
            path = path if name is None else picture_name(out.parent, name)
            found = _requests(line.place, orders, path, several=len(orders) > 1)
            paths = [path for request in found for path in request.paths]
            for each in paths:
                if each in places:
                    raise UsageError(f"{each} is also the picture of {places[each]}. Name another.")
            places |= dict.fromkeys(paths, line.place)
        except UsageError as error:
            failed(line.place, error)
        else:
            requests += found
    return requests


def _requests(place: str, orders: Sequence[Order], path: Path, *, several: bool) -> list[Request]:
    """Requests of orders whose pictures are called after `path`. several: whether seeds differ."""
    count = orders[0].num_images_per_prompt
    if not 1 <= count <= _MOST_PICTURES:
        raise UsageError(f"`num_images` is {count}; it must be from 1 to {_MOST_PICTURES}.")
    seeds = [order.seed or 0 for order in orders for _ in range(count)]
    paths = picture_paths(path, len(seeds), seeds if several else None)
    return [
        Request(place, order, tuple(paths[number * count : (number + 1) * count]))
        for number, order in enumerate(orders)
    ]


def make_jobs(
    pipe: FluxPipeline, requests: Iterable[Request], index: Index | None, failed: Failed
) -> list[Job]:
    """The jobs of all requests that can be drawn, each checked, with what is there already."""
    jobs = []
    for request in requests:
        try:
            files = check_order(pipe, request.order)
        except FluxDeployError as error:
            failed(request.place, error)
            continue
        order = request.order.filled(pipe.bundle.manifest)
        digest = order.digest(files, pipe.bundle.content_hash)
        jobs.append(find_made(Job(order, request.place, request.paths, digest), index))
    return jobs
