"""What a pipeline counts, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PipelineStats"]


@dataclass(frozen=True)
class PipelineStats:
    """Counts of a `FluxPipeline`, from its making on, and its queue as it is now.

    pictures: those that were made. steps: those of all calls, of cancelled ones too.
    prompt_hits, prompt_misses: how often what a text encoder gives was kept already, and how often
        the encoder ran: two of them for a call, and two for its negative prompts.
    waiting: calls that wait to begin. running: calls that have begun and not ended.
    """

    pictures: int
    steps: int
    prompt_hits: int
    prompt_misses: int
    waiting: int
    running: int
