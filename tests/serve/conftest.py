"""Servers over the demo bundle, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.turns import QueueLimits

pytest.importorskip("fastapi")
import uvicorn

from fluxdeploy.serve.images_api.app import create_app
from fluxdeploy.serve.images_api.server import listen, local_backend
from fluxdeploy.serve.images_api.settings import Settings

LIMIT = 60
"""Seconds after which a test that hangs gives up."""

SMALL = Settings("demo", max_pixels=10 * 160 * 160, max_steps=400)


@pytest.fixture(scope="module")
def pipeline(demo_bundle: Path) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(demo_bundle, limits=QueueLimits(waiting=40)) as pipe:
        yield pipe


Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def serving(pipeline: FluxPipeline) -> Serving:
    """`with serving(max_steps=3) as url`: a server with these settings."""
    backend = local_backend(pipeline)
    # The pipeline serves several of them.
    backend.aclose = _nothing  # type: ignore[method-assign]

    @contextmanager
    def serve(**settings: Any) -> Iterator[str]:
        with running(backend, replace(SMALL, **settings)) as url:
            yield url

    return serve


async def _nothing() -> None:
    pass


@contextmanager
def running(backend: Any, settings: Settings) -> Iterator[str]:
    """The URL of a server in a thread."""
    config = uvicorn.Config(create_app(backend, settings), log_level="critical")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([opened])), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(LIMIT)


@pytest.fixture(scope="module")
def url(serving: Serving) -> Iterator[str]:
    with serving() as address:
        yield address


def connect(url: str) -> socket.socket:
    """A raw connection to a server."""
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), LIMIT)
