"""`fluxdeploy serve`: the images API of OpenAI, over a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fluxdeploy.cli.options import BUNDLE, DEVICE, FILE, RUNTIME, THREADS
from fluxdeploy.errors import MissingDependencyError, UsageError
from fluxdeploy.install import install_command
from fluxdeploy.terminal import say

_KEYS_VARIABLE = "FLUXDEPLOY_API_KEYS"
_MAX_KEYS = 1 << 20


@click.command()
@BUNDLE
@RUNTIME
@DEVICE
@THREADS
@click.option(
    "--low-vram",
    is_flag=True,
    help="Open each engine only while it is needed; each picture ends before the next begins.",
)
@click.option(
    "--triton",
    metavar="HOST:PORT",
    help="Draw on a Triton server with a repository of `fluxdeploy triton`, whose gRPC port this "
    "is, instead of a bundle; it has its own runtime, device and queue.",
)
@click.option("--host", default="127.0.0.1", help="The address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes a free one.")
@click.option(
    "--model-name", help="What requests call the model.  [default: the checkpoint's name]"
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    help="Requests of a priority that may wait; one more is answered with 503.",
)
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="What requests that have begun may hold together, besides the engines.  "
    "[default: a quarter of what is free]",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=256),
    default=16 << 20,
    help="Pixels of all pictures of a request.",
)
@click.option("--max-steps", type=click.IntRange(min=1), default=200, help="Steps of a request.")
@click.option(
    "--max-body",
    type=click.IntRange(min=1),
    metavar="MIB",
    default=64,
    help="Bytes of a request, with its images.",
)
@click.option(
    "--api-keys",
    type=FILE,
    metavar="FILE",
    help="Serve only requests with one of the keys in this file, one a line. "
    f"{_KEYS_VARIABLE} may hold them instead, with commas between.",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin use the API, such as https://example.org. May be repeated.",
)
def command(
    bundle: Path,
    runtime: str,
    device: int,
    threads: int | None,
    low_vram: bool,
    triton: str | None,
    host: str,
    port: int,
    model_name: str | None,
    max_waiting: int,
    max_memory: int | None,
    max_pixels: int,
    max_steps: int,
    max_body: int,
    api_keys: Path | None,
    origins: tuple[str, ...],
) -> None:
    """Serve pictures over HTTP, as OpenAI's images API.

    Clients of that API draw and edit pictures here, watch them as they become clear, and get the
    fields of FLUX beside OpenAI's. At / is a page to try it. Several requests share the engines
    between two steps, by priority and in fair shares. SIGTERM and Ctrl-C let running requests end.

    \b
    Examples:
      fluxdeploy serve
      fluxdeploy serve --bundle flux-dev --host 0.0.0.0 --api-keys keys.txt
      fluxdeploy serve --triton localhost:8001
      curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"prompt": "a red circle above a blue square", "response_format": "url"}'
    """
    from fluxdeploy.machine import read_memory

    keys = _read_keys(api_keys)
    try:
        from fluxdeploy.serve.images_api.calls import Backend
        from fluxdeploy.serve.images_api.server import listen, local_backend, run
        from fluxdeploy.serve.images_api.settings import Settings
    except ImportError as error:
        raise MissingDependencyError(
            f"Serving needs {error.name}. Install it with `{install_command('serve')}`."
        ) from error

    from engines.base import EngineOptions
    from fluxdeploy.host.pipeline import FluxPipeline
    from fluxdeploy.host.turns import QueueLimits
    from fluxdeploy.serve.triton.backend import TritonBackend

    settings = Settings(
        model=model_name,
        keys=keys,
        origins=origins,
        max_body=max_body << 20,
        max_pixels=max_pixels,
        max_steps=max_steps,
    )
    free = read_memory().available
    memory = max_memory << 20 if max_memory else None if free is None else max(free // 4, 1)

    async def connect() -> Backend:
        if triton is not None:
            return await TritonBackend.connect(triton)
        say(f"Warming up {bundle} ...", err=True)
        options, limits = EngineOptions(threads, device), QueueLimits(max_waiting, memory)
        pipeline = FluxPipeline.from_bundle(bundle, runtime, options, low_vram, limits)
        return local_backend(pipeline)

    with listen(host, port) as opened:
        address = f"[{host}]" if ":" in host else host
        where = f"http://{address}:{opened.getsockname()[1]}"
        run(connect, settings, opened, lambda: say(f"Serving at {where}", err=True))


def _read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of the file, or of the environment. Raises `UsageError` where there are none."""
    if path is None:
        text = os.environ.get(_KEYS_VARIABLE)
        return () if text is None else _checked_keys(text.split(","), _KEYS_VARIABLE)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_KEYS).decode("ascii")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} has a key with letters that a header cannot hold.") from error
    return _checked_keys(text.splitlines(), str(path))


def _checked_keys(lines: list[str], where: str) -> tuple[str, ...]:
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UsageError(f"{where} has no keys. Write one a line, or serve without it.")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError(f"{where} has a key with letters that a header cannot hold.")
    return keys
