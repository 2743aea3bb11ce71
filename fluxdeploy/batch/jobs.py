"""The work of a batch: which pictures of which orders are to be drawn, and which are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fluxdeploy.batch.index import Entry, Index
from fluxdeploy.batch.order import TEXTS, Order
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pictures import check_picture_path

__all__ = ["Job", "alike", "find_made", "picture_name"]

_MOST_AT_ONCE = 8
_TOKENS_AT_ONCE = 1024
"""Of all pictures of a call. Small pictures take as long to begin as to compute; on a CPU a picture
of 100 tokens gains nothing from others beside it."""


@dataclass(frozen=True)
class Job:
    """One call: an order that has all values but the sizes of an outpainted canvas, and its files.

    place: where the order stands, for messages; empty on the command line. made: the entries of
    pictures that are there already, by their numbers.
    """

    order: Order
    place: str
    paths: tuple[Path, ...]
    request: str
    made: tuple[tuple[int, Entry], ...] = ()

    @property
    def done(self) -> bool:
        """Whether all its pictures are there."""
        return len(self.made) == len(self.paths)


def picture_name(folder: Path, out: str) -> Path:
    """The file that a line names, in the folder of the batch. Raises `UsageError`."""
    path = PurePosixPath(out.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in out or "\0" in out:
        raise UsageError(f"`out` is {out!r}. Name a file in the folder of --out, or below it.")
    check_picture_path(folder / path)
    if len(path.name.encode("utf-8", "replace")) > 200:
        raise UsageError(f"`out` is {path.name[:20]!r}..., which is too long for a file's name.")
    return folder / path


def find_made(job: Job, index: Index | None) -> Job:
    """The job with what the index has of it, and with a seed: that of its pictures, or a new one.

    The pictures of a call are of one seed: where it was a random one, those that are there say so.
    """
    seed = job.order.seed
    found: list[tuple[int, Entry]] = []
    for number, path in enumerate(job.paths):
        entry = None if index is None else index.find(path, job.request)
        if entry is not None and entry.seed == (entry.seed if seed is None else seed):
            seed = entry.seed
            found.append((number, entry))
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    return replace(job, order=replace(job.order, seed=seed), made=tuple(found))


def alike(
    jobs: Iterable[Job], tokens: Callable[[Job], int], most: int | None = None
) -> Iterator[Sequence[Job]]:
    """Jobs that are one call, each group in order: small pictures of one shape, from text alone.

    tokens: of a picture of a job. most: pictures in a group, where that is given.
    """
    open_groups: dict[object, list[Job]] = {}
    for job in jobs:
        order = job.order
        limit = most or min(_MOST_AT_ONCE, _TOKENS_AT_ONCE // tokens(job))
        limit //= order.num_images_per_prompt
        pictures = order.image or order.mask_image or order.control_image or order.redux_image
        if pictures or limit < 2:
            yield [job]
            continue
        # A text is one that all have, or none.
        texts: dict[str, Any] = {name: getattr(order, name) and "-" for name in TEXTS}
        shape = replace(order, prompt="", seed=0, **texts)
        group = open_groups.setdefault(shape, [])
        group.append(job)
        if len(group) >= limit:
            yield open_groups.pop(shape)
    yield from open_groups.values()
