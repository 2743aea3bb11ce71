"""Drawing one call of a batch in this process: what of it fails is told, and the rest is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fluxdeploy.batch.draw import Drawn, OnPreview, draw
from fluxdeploy.batch.jobs import Job
from fluxdeploy.batch.plan import Failed
from fluxdeploy.errors import EngineError, NumericError, UsageError
from fluxdeploy.native import exhausted

if TYPE_CHECKING:
    from fluxdeploy.host.pipeline import FluxPipeline

__all__ = ["drawn_here"]

_OF_A_JOB = (UsageError, NumericError, EngineError)
"""What another job may not meet. A bundle that is gone, or a full disk, ends the batch."""


def drawn_here(
    pipe: FluxPipeline,
    group: Sequence[Job],
    failed: Failed,
    on_step: Callable[[], None],
    on_preview: OnPreview | None = None,
) -> list[tuple[Job, tuple[Drawn, ...]]]:
    """The pictures of a group; one by one where they cannot be drawn together."""
    known: EngineError | NumericError | UsageError
    try:
        return list(zip(group, draw(pipe, group, on_step, on_preview), strict=True))
    except _OF_A_JOB as error:
        known = error
    except Exception as error:
        why = exhausted(error)
        if why is None:
            raise
        known = EngineError(f"{why[0].upper()}{why[1:]}.")
    if len(group) == 1:
        failed(group[0].place, known)
        return []
    return [
        each for job in group for each in drawn_here(pipe, [job], failed, lambda: None, on_preview)
    ]
