"""A contender's own process, which `fluxdeploy.bench.process` starts with a job.

Each contender has its memory, its threads and its start for itself. The process loads, draws its
first picture and saves it, which is a cold start. Then it does what it reads, a word a line, and
answers each with a JSON object a line: `draw` a picture, `keep` the last one's numbers in files.
It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from engines.base import Array
    from fluxdeploy.bench.contender import LoadedContender
    from fluxdeploy.bench.job import Job
    from fluxdeploy.bench.stopwatch import Stopwatch

__all__ = ["PICTURES", "VELOCITY", "main"]

PICTURES, VELOCITY = "pictures.npy", "velocity.npy"
"""The files of `keep`: uint8 [B, H, W, 3], and float32 [B, L, C] of the first step."""


def main(argument: str) -> None:
    """Do the job, whose fields are a JSON object."""
    from fluxdeploy.errors import FluxDeployError

    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        _serve(argument, answer)
    except FluxDeployError as error:
        answer({"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # noqa: BLE001 - the command tells it, with what the library printed
        what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        answer({"error": "", "message": what})


def _serve(argument: str, answer: Any) -> None:
    from fluxdeploy.bench.job import Job
    from fluxdeploy.machine import peak_memory

    job = Job(**json.loads(argument))
    watch = _make_watch(job)
    contender = _open(job, watch)
    images = contender.draw()
    images[0].save(Path(job.folder) / "first.png")
    answer({"laps": watch.laps(), "memory": peak_memory()})
    for line in sys.stdin:
        if line.strip() == "keep":
            _keep(images, contender.velocity, Path(job.folder))
            answer({})
        else:
            images, laps = _draw(contender, watch)
            answer({"laps": laps, "memory": peak_memory()})


def _make_watch(job: Job) -> Stopwatch:
    from fluxdeploy.bench.stopwatch import Stopwatch

    if job.device == "cpu" or job.contender == "bundle":
        return Stopwatch()  # our engines return when they are done
    import torch

    return Stopwatch(torch.cuda.synchronize)


def _open(job: Job, watch: Stopwatch) -> LoadedContender:
    if job.contender == "bundle":
        from fluxdeploy.bench.bundle_contender import BundleContender

        return BundleContender(job, watch)
    from fluxdeploy.bench.peers.diffusers import DiffusersContender

    return DiffusersContender(job, watch)


def _draw(contender: LoadedContender, watch: Stopwatch) -> tuple[list[Image], Mapping[str, Any]]:
    watch.clear()
    with watch.component("picture"):
        images = contender.draw()
    return images, watch.laps()


def _keep(images: list[Image], velocity: Array, folder: Path) -> None:
    import numpy as np

    np.save(folder / PICTURES, np.stack([np.asarray(image.convert("RGB")) for image in images]))
    np.save(folder / VELOCITY, velocity)


if __name__ == "__main__":
    main(sys.argv[1])
