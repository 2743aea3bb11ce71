"""The run of a batch: each picture is written, and entered in the index, when it is made."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fluxdeploy.batch.draw import Drawn, OnPreview
from fluxdeploy.batch.here import drawn_here
from fluxdeploy.batch.index import Entry, Index
from fluxdeploy.batch.jobs import Job, alike
from fluxdeploy.batch.plan import Failed
from fluxdeploy.host.pictures import write_file
from fluxdeploy.sampling.latents import token_grid
from fluxdeploy.sampling.sampler import load_sampler

if TYPE_CHECKING:
    from fluxdeploy.batch.cluster import Cluster
    from fluxdeploy.host.pipeline import FluxPipeline
    from fluxdeploy.progress import Progress

__all__ = ["run_jobs"]


def run_jobs(
    pipe: FluxPipeline,
    jobs: Sequence[Job],
    index: Index | None,
    failed: Failed,
    progress: Progress,
    at_once: int | None = None,
    on_preview: OnPreview | None = None,
    cluster: Cluster | None = None,
) -> None:
    """Draw the jobs that are not done, and write their pictures.

    index: where each picture is entered once it is in place. at_once: pictures of a call; as many
    as pay where None. on_preview: is shown each step. cluster: what draws in place of `pipe`.
    Raises what ends the batch: what is written stays.
    """
    waiting = [job for job in jobs if not job.done]
    task = progress.task("Generating", total=max(1, sum(map(_work, waiting))))

    def tokens(job: Job) -> int:
        rows, columns = token_grid(*_size(job), pipe.bundle.manifest.latents)
        return rows * columns + (job.order.max_sequence_length or 0)

    groups = alike(waiting, tokens, at_once)
    if cluster is not None:
        for group, made in cluster.draw(groups, failed):
            for job, drawn in made:
                _write(job, drawn, index)
            task.advance(sum(map(_work, group)))
        return
    for group in groups:
        before = task.done
        step = sum(map(_work, group)) / ((group[0].order.num_inference_steps or 0) + 1)
        advance = functools.partial(task.advance, step)
        for job, drawn in drawn_here(pipe, group, failed, advance, on_preview):
            _write(job, drawn, index)
        # The decoding, and the steps that an image saves.
        task.advance(before + sum(map(_work, group)) - task.done)


def _write(job: Job, drawn: Sequence[Drawn], index: Index | None) -> None:
    order, there = job.order, dict(job.made)
    for number, (path, picture) in enumerate(zip(job.paths, drawn, strict=True)):
        if number in there:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)  # a line may name a folder
        write_file(picture.png, path)
        if index is None:
            continue
        assert order.seed is not None
        assert order.num_inference_steps is not None
        index.add(
            Entry(
                path=index.relative(path),
                prompt=order.prompt,
                seed=order.seed,
                index=number,
                width=picture.width,
                height=picture.height,
                num_inference_steps=order.num_inference_steps,
                seconds=round(picture.seconds, 3),
                bytes=len(picture.png),
                sha256=hashlib.sha256(picture.png).hexdigest(),
                request=job.request,
            )
        )


def _size(job: Job) -> tuple[int, int]:
    """Height and width; of an outpainted canvas a guess, which only progress hears of."""
    return job.order.height or 1024, job.order.width or 1024


def _work(job: Job) -> float:
    """Pixels times evaluations, where decoding is one."""
    order = job.order
    height, width = _size(job)
    sides = 2 if order.negative_prompt is not None and order.true_cfg_scale > 1 else 1
    runs = load_sampler(order.sampler).evaluations(order.num_inference_steps or 0) + 1
    return float(height * width * runs * sides * len(job.paths))
