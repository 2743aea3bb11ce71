"""From prompts, or lines of a file, to jobs: what is wanted, where it goes, and what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdeploy.batch.draw import check_order
from fluxdeploy.batch.index import Index
from fluxdeploy.batch.jobs import Job, find_made, named, picture_name
from fluxdeploy.batch.lines import Line
from fluxdeploy.batch.order import Order, read_order
from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.host.pictures import picture_paths

if TYPE_CHECKING:
    from fluxdeploy.host.pipeline import FluxPipeline

__all__ = ["Failed", "Request", "index_path", "make_jobs", "of_lines", "of_prompts"]

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
    """A request for each prompt, all with one seed. Raises `UsageError` for `out`."""
    if usual["seed"] is None:
        usual = {**usual, "seed": int.from_bytes(os.urandom(4), "little")}
    orders = [Order(**{**usual, "prompt": prompt}) for prompt in prompts]
    count: int = usual["num_images_per_prompt"]
    paths = picture_paths(out, count * len(orders))
    return [
        Request("", order, tuple(paths[number * count : (number + 1) * count]))
        for number, order in enumerate(orders)
    ]


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
            order, name = read_order(line.values, usual, folder)
            path = out.with_name(f"{out.stem}-{line.number:05}{out.suffix}")
            paths = named(path if name is None else picture_name(out.parent, name), _count(order))
            for each in paths:
                if each in places:
                    raise UsageError(f"{each} is also the picture of {places[each]}. Name another.")
            places |= dict.fromkeys(paths, line.place)
        except UsageError as error:
            failed(line.place, error)
        else:
            requests.append(Request(line.place, order, paths))
    return requests


def _count(order: Order) -> int:
    if not 1 <= order.num_images_per_prompt <= 1000:
        raise UsageError(
            f"`num_images` is {order.num_images_per_prompt}; it must be from 1 to 1000."
        )
    return order.num_images_per_prompt


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
        order = request.order.filled(pipe.bundle.manifest.defaults)
        digest = order.digest(files, pipe.bundle.content_hash)
        jobs.append(find_made(Job(order, request.place, request.paths, digest), index))
    return jobs
