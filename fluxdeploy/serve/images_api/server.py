"""The server's process: warm engines, one address, and an end that lets requests end first."""

from __future__ import annotations

import asyncio
import signal
import socket
import warnings
from collections.abc import Awaitable, Callable

import uvicorn

from fluxdeploy.errors import CutPromptWarning, TiledWarning, UnusedArgumentWarning, UsageError
from fluxdeploy.host.asynchronous import AsyncFluxPipeline
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.serve.images_api.app import create_app
from fluxdeploy.serve.images_api.calls import Backend
from fluxdeploy.serve.images_api.local import LocalBackend
from fluxdeploy.serve.images_api.settings import Settings

__all__ = ["listen", "local_backend", "run"]

_PATIENCE = 600
"""Seconds that running requests have to end, once the server is told to."""


def local_backend(pipeline: FluxPipeline) -> LocalBackend:
    """A backend over a pipeline, all of whose engines are opened and have run."""
    pipeline.warm_up()
    return LocalBackend(AsyncFluxPipeline(pipeline))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one. Raises `UsageError`."""
    if not host:
        raise UsageError("--host is empty. Name an address, 0.0.0.0 for all of this machine's.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(2048)
    except (OSError, TypeError, UnicodeError) as error:
        opened.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"Cannot listen at {host}, port {port}: {reason}. Name another "
            "address with --host and --port."
        ) from error
    return opened


def run(
    connect: Callable[[], Awaitable[Backend]],
    settings: Settings,
    opened: socket.socket,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until the running requests have ended.

    connect: makes the backend, in the loop that it is used in. ready: called once requests are
    taken. Raises what `connect` raises.
    """

    async def serve() -> None:
        config = uvicorn.Config(
            create_app(await connect(), settings),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE,
            h11_max_incomplete_event_size=32 << 10,
        )
        # uvicorn raises the signal once more when all is over; by then it has been obeyed.
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            await _Server(config, ready).serve([opened])
        finally:
            signal.signal(signal.SIGTERM, before)

    # They are told to the request that they are of, as its notices.
    for kind in (CutPromptWarning, TiledWarning, UnusedArgumentWarning):
        warnings.simplefilter("ignore", kind)
    asyncio.run(serve())


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
