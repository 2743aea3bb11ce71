"""A contender that is loaded, in a process of its own, and draws when it is told to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import Array
from fluxdeploy.bench.job import Job
from fluxdeploy.bench.stopwatch import Stopwatch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LoadedContender"]


class LoadedContender(ABC):
    """Draws a job's pictures, timed by `watch`, and remembers the first step of the last one."""

    def __init__(self, job: Job, watch: Stopwatch) -> None:
        self._job = job
        self._watch = watch
        self._velocity: list[Array] = []

    def draw(self) -> list[Image]:
        """The job's pictures."""
        self._velocity = []
        job = self._job
        return self._call(
            prompt=job.prompt,
            height=job.height,
            width=job.width,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            num_images_per_prompt=job.batch,
            max_sequence_length=job.text_tokens,
        )

    @property
    def velocity(self) -> Array:
        """What the transformer gave in the first step of the last picture: float32 [B, L, C]."""
        assert self._velocity, "no picture was drawn"
        return np.concatenate(self._velocity)

    @abstractmethod
    def _call(self, **arguments: Any) -> list[Image]:
        """Call the pipeline with what it shares with the others, and with its own noise."""

    def _keep_first(self, velocity: Callable[[], Any]) -> None:
        """Remember what the transformer gave, until it is that of each picture once.

        `velocity` is called for that step alone: what it copies costs time.
        """
        if sum(map(len, self._velocity)) < self._job.batch:
            self._velocity.append(np.array(velocity(), np.float32))
