"""The pipeline for programs on asyncio: calls that are awaited, and watched as they go on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineOptions
from fluxdeploy.errors import UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pipeline import FluxPipeline, FluxPipelineOutput
from fluxdeploy.host.turns import QueueLimits

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AsyncFluxPipeline", "Preview", "StepEnd"]

_T = TypeVar("_T")

_OURS = ("callback_on_step_end", "callback_on_preview", "cancel")
"""Arguments of `FluxPipeline.__call__` that a task's cancelling and its events stand for."""


@dataclass(frozen=True)
class StepEnd:
    """A step was made: `step` of them so far, counted from 1, at a noise level of 0 to 1."""

    step: int
    sigma: float


@dataclass(frozen=True)
class Preview:
    """What the call would end with, after so many steps; images as in `FluxPipelineOutput`."""

    step: int
    images: list[Image] | NDArray[np.float32]


class AsyncFluxPipeline:
    """A `FluxPipeline` whose calls are awaited. Cancelling the task that waits ends the call.

    Each call has a thread of its own, which waits for its turn as other threads do. An asynchronous
    context manager; leaving it closes the pipeline, after the running calls.
    """

    def __init__(self, pipeline: FluxPipeline) -> None:
        self._pipeline = pipeline

    @classmethod
    async def from_bundle(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "auto",
        options: EngineOptions | None = None,
        low_vram: bool = False,
        limits: QueueLimits | None = None,
    ) -> AsyncFluxPipeline:
        """As `FluxPipeline.from_bundle`, which reads the bundle's files and hashes."""
        opened = await _in_thread(
            lambda: FluxPipeline.from_bundle(path, runtime, options, low_vram, limits)
        )
        return cls(opened)

    @property
    def pipeline(self) -> FluxPipeline:
        """The pipeline that makes the pictures."""
        return self._pipeline

    async def __call__(self, *prompts: Any, **arguments: Any) -> FluxPipelineOutput:
        """What `FluxPipeline.__call__` makes of these arguments.

        Raises what it raises. A callback runs in the call's own thread.
        """
        if "cancel" in arguments:
            raise UsageError("Cancel the task that waits for this call, instead of `cancel`.")
        token = CancelToken()
        try:
            return await _in_thread(lambda: self._pipeline(*prompts, cancel=token, **arguments))
        except asyncio.CancelledError:
            token.cancel()
            raise

    async def stream(
        self, *prompts: Any, **arguments: Any
    ) -> AsyncGenerator[StepEnd | Preview | FluxPipelineOutput, None]:
        """The steps of a call as they are made, `num_previews` pictures between, and its output.

        The arguments are those of `FluxPipeline.__call__`. Leaving the iterator, by `aclose` or by
        cancelling the task, ends the call. Raises what the call raises.
        """
        for name in _OURS:
            if name in arguments:
                raise UsageError(f"`stream` tells by its events what `{name}` would. Leave it out.")
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StepEnd | Preview | None] = asyncio.Queue()
        token = CancelToken()

        def tell(event: StepEnd | Preview | None) -> None:
            _threadsafe(loop, lambda: events.put_nowait(event))

        def on_step_end(pipe: object, step: int, timestep: float, state: object) -> None:
            tell(StepEnd(step + 1, timestep / 1000))

        def on_preview(pipe: object, steps: int, images: Any) -> None:
            tell(Preview(steps, images))

        def run() -> FluxPipelineOutput:
            try:
                return self._pipeline(
                    *prompts,
                    callback_on_step_end=on_step_end,
                    callback_on_preview=on_preview,
                    cancel=token,
                    **arguments,
                )
            finally:
                tell(None)

        call = asyncio.ensure_future(_in_thread(run))
        # Where there is no thread to be had, nothing else tells.
        call.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await call
        finally:
            token.cancel()
            if not call.cancel() and not call.cancelled():
                call.exception()  # it is nobody's any more

    async def aclose(self) -> None:
        """Free the engines and the encoded prompts, after the running calls."""
        await _in_thread(self._pipeline.close)

    async def __aenter__(self) -> AsyncFluxPipeline:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


async def _in_thread(work: Callable[[], _T]) -> _T:
    """What `work` gives, in a thread of its own: a pool's would be taken by calls that wait."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(how: Callable[[Any], None], value: object) -> None:
        _threadsafe(loop, lambda: None if future.done() else how(value))

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is awaited
            settle(future.set_exception, error)
        else:
            settle(future.set_result, result)

    threading.Thread(target=run, name="fluxdeploy-call", daemon=True).start()
    return await future


def _threadsafe(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call it in the loop, unless the program has left that."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
