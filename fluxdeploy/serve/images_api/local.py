"""The pipeline of this process, as what a server draws with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.asynchronous import AsyncFluxPipeline
from fluxdeploy.serve.images_api.calls import Event

__all__ = ["LocalBackend"]


class LocalBackend:
    """A `Backend` over a pipeline."""

    def __init__(self, pipeline: AsyncFluxPipeline) -> None:
        self._pipeline = pipeline

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is served."""
        return self._pipeline.pipeline.bundle.manifest

    def stream(self, prompt: str, **arguments: Any) -> AsyncIterator[Event]:
        """As `AsyncFluxPipeline.stream`."""
        return self._pipeline.stream(prompt, **arguments)

    async def ready(self) -> bool:
        """A pipeline that is open takes calls."""
        return True

    def figures(self) -> Mapping[str, tuple[str, float]]:
        """The queue's lengths."""
        queue = self._pipeline.pipeline.queue
        return {
            "waiting": ("Calls that wait to begin.", queue.waiting),
            "running": ("Calls that have begun and not ended.", queue.running),
        }

    async def aclose(self) -> None:
        """Free the engines, after the running calls."""
        await self._pipeline.aclose()
