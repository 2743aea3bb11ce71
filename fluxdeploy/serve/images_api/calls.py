"""The way of a request: its call goes on while its client is there, and ends when that leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from PIL.Image import Image
from starlette.requests import Request

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host.asynchronous import Preview, StepEnd
from fluxdeploy.host.pipeline import FluxPipelineOutput
from fluxdeploy.serve.images_api.drawing import Drawing
from fluxdeploy.serve.images_api.errors import ApiError, as_api_error
from fluxdeploy.serve.images_api.metrics import Metrics
from fluxdeploy.serve.images_api.replies import event
from fluxdeploy.serve.picture_files import as_base64, encode

__all__ = ["Backend", "Event", "Gone", "described", "drawn", "finish", "stream_events"]

Event = StepEnd | Preview | FluxPipelineOutput

_SOON = 0.25
"""Seconds for a call to be refused; after them a stream begins, whose status can tell no more."""


class Backend(Protocol):
    """Where pictures are made: the pipeline of this process, or a Triton server."""

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is served."""

    def stream(self, prompt: str, **arguments: Any) -> AsyncIterator[Event]:
        """As `AsyncFluxPipeline.stream`."""

    async def ready(self) -> bool:
        """Whether calls are taken."""

    def figures(self) -> Mapping[str, tuple[str, float]]:
        """Numbers for Prometheus: by name, what they are and what they are now."""

    async def aclose(self) -> None:
        """Free what it holds, after the running calls."""


class Gone(Exception):
    """The client has left; nobody reads an answer."""


async def drawn(
    request: Request, backend: Backend, drawing: Drawing, metrics: Metrics
) -> FluxPipelineOutput:
    """The pictures of a call. Raises `Gone` where the client leaves first, and `ApiError`."""
    call = asyncio.create_task(_last(_events(backend, drawing, metrics)))
    leaving = asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait({call, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            raise Gone
        return call.result()
    finally:
        for task in (call, leaving):
            task.cancel()


async def stream_events(
    backend: Backend, drawing: Drawing, metrics: Metrics, kind: str
) -> AsyncIterator[bytes]:
    """Server-sent events of a call, of the `kind` "image_generation" or "image_edit".

    Awaiting this waits for a moment, in which a call that cannot be is refused: it raises
    `ApiError`. Leaving the iterator ends the call.
    """
    events = _events(backend, drawing, metrics)
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=_SOON)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    return _encoded(first, events, drawing, kind)


async def _encoded(
    first: asyncio.Future[Event], events: AsyncIterator[Event], drawing: Drawing, kind: str
) -> AsyncIterator[bytes]:
    shown = 0
    try:
        next_event = first
        while True:
            try:
                each = await next_event
            except StopAsyncIteration:
                return
            except ApiError as error:
                yield event("error", error.body())
                return
            if isinstance(each, StepEnd):
                if drawing.body.stream_steps:
                    steps = {"step": each.step, "noise_level": each.sigma}
                    yield event(f"{kind}.step", steps)
            elif isinstance(each, Preview):
                picture = each.images[0]
                fields = await _picture_fields(drawing, picture)
                fields |= {"partial_image_index": shown, "step": each.step}
                # Those of the linear map are smaller than what is drawn.
                fields |= {"size": f"{picture.width}x{picture.height}"}
                shown += 1
                yield event(f"{kind}.partial_image", fields)
            else:
                fields = await _picture_fields(drawing, each.images[0])
                fields |= {"seed": each.seed, **drawing.echo, "notices": list(each.notices)}
                yield event(f"{kind}.completed", fields)
            next_event = asyncio.ensure_future(anext(events))
    finally:
        next_event.cancel()
        await events.aclose()  # type: ignore[attr-defined]


async def _picture_fields(drawing: Drawing, image: Image) -> dict[str, Any]:
    data = await finish(drawing, image)
    return {"b64_json": as_base64(data), "created_at": drawing.created, **described(drawing)}


def described(drawing: Drawing) -> dict[str, Any]:
    """What replies say of their pictures."""
    return {
        "size": f"{drawing.width}x{drawing.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": drawing.body.output_format,
    }


async def finish(drawing: Drawing, image: Image) -> bytes:
    """The picture's file, made beside the loop, which serves others meanwhile."""
    body = drawing.body
    return await asyncio.to_thread(encode, image, body.output_format, body.output_compression)


async def _events(backend: Backend, drawing: Drawing, metrics: Metrics) -> AsyncIterator[Event]:
    """The events of a call, counted. Raises `ApiError`."""
    body, began = drawing.body, time.perf_counter()
    steps = 0
    events = backend.stream(body.prompt, **drawing.arguments)
    try:
        async with aclosing(events) as held:  # type: ignore[type-var]
            async for each in held:
                if isinstance(each, StepEnd):
                    steps += 1
                    metrics.step()
                elif isinstance(each, FluxPipelineOutput):
                    pixels = body.n * drawing.width * drawing.height
                    seconds = time.perf_counter() - began
                    metrics.drawn(body.n, pixels, each.seconds, seconds, body.priority)
                yield each
    except FluxDeployError as error:
        raise as_api_error(error) from error
    except (asyncio.CancelledError, GeneratorExit):
        metrics.cancelled(None if steps else time.perf_counter() - began)
        raise


async def _last(events: AsyncIterator[Event]) -> FluxPipelineOutput:
    last: Event | None = None
    async for each in events:
        last = each
    assert isinstance(last, FluxPipelineOutput)  # or it has raised
    return last


async def _leaves(request: Request) -> None:
    """Wait until the client has left, after its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
