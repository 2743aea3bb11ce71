"""What a contender remembers of its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from fluxdeploy.bench.contender import LoadedContender
from fluxdeploy.bench.stopwatch import Stopwatch


class Drawn(LoadedContender):
    """Gives a velocity for each part of its batch, in each of two steps."""

    parts: tuple[int, ...] = ()

    def _call(self, **arguments: Any) -> list[Any]:
        for step in range(2):
            for part in self.parts:
                self._keep_first(lambda: np.full((part, 6, 4), step + part / 10))  # noqa: B023
        return []


def test_the_first_velocity_is_that_of_every_picture_of_a_divided_batch() -> None:
    job = SimpleNamespace(
        prompt="", height=1, width=1, steps=2, guidance=1.0, batch=5, text_tokens=1
    )
    contender = Drawn(job, Stopwatch())  # type: ignore[arg-type]
    for parts in ((5,), (2, 2, 1)):
        contender.parts = parts
        contender.draw()
        expected = [value for part in parts for value in [part / 10] * part]
        np.testing.assert_allclose(contender.velocity[:, 0, 0], expected)
