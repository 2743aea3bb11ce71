"""The pipeline of this process, as what a server draws with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import EngineError
from fluxdeploy.host.asynchronous import AsyncFluxPipeline
from fluxdeploy.serve.images_api.calls import Event

__all__ = ["FIGURES", "LocalBackend"]

FIGURES = {
    "waiting": "Calls that wait to begin.",
    "running": "Calls that have begun and not ended.",
    "prompt_hits_total": "Times that a text encoder's output was kept already.",
    "prompt_misses_total": "Times that a text encoder ran.",
}
"""What a pipeline keeps for Prometheus."""


class LocalBackend:
    """A `Backend` over a pipeline."""

    def __init__(self, pipeline: AsyncFluxPipeline) -> None:
        self._pipeline = pipeline
        self._failed = False

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is served."""
        return self._pipeline.pipeline.bundle.manifest

    async def stream(self, prompt: str, **arguments: Any) -> AsyncIterator[Event]:
        """As `AsyncFluxPipeline.stream`."""
        try:
            async with aclosing(self._pipeline.stream(prompt, **arguments)) as events:
                async for event in events:
                    yield event
            self._failed = False
        except EngineError:
            self._failed = True
            raise

    async def ready(self) -> bool:
        """Whether the engines ran, when they were last asked to."""
        return not self._failed

    def figures(self) -> Mapping[str, tuple[str, float]]:
        """What the pipeline counts."""
        stats = self._pipeline.pipeline.stats
        values = (stats.waiting, stats.running, stats.prompt_hits, stats.prompt_misses)
        return {
            name: (text, value) for (name, text), value in zip(FIGURES.items(), values, strict=True)
        }

    async def aclose(self) -> None:
        """Free the engines, after the running calls."""
        await self._pipeline.aclose()
