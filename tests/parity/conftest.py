"""Opened pipelines of the random checkpoints: ours, and diffusers' on the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engines import EngineOptions
from fluxdeploy.host.pipeline import FluxPipeline

Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def open_pipeline(bundle: Factory) -> Iterator[Callable[..., FluxPipeline]]:
    """`open_pipeline(name, layout="diffusers", threads=None)`: ours, on a checkpoint's bundle."""
    with ExitStack() as opened:

        @functools.cache
        def make(name: str, layout: str = "diffusers", threads: int | None = None) -> FluxPipeline:
            options = EngineOptions(threads=threads)
            pipe = FluxPipeline.from_bundle(bundle(name, layout), options=options)
            return opened.enter_context(pipe)

        yield make


@pytest.fixture(scope="session")
def open_reference(checkpoint: Factory) -> Callable[..., Any]:
    """`open_reference(name, dtype=torch.float32)`: diffusers' FluxPipeline on the same checkpoint.

    For what it computes without rounding, run the one in float64 within
    `tests.support.float64.exact_arithmetic`.
    """
    import torch

    from tests.support.checkpoints import load_diffusers

    @functools.cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
        return load_diffusers(checkpoint(name), dtype)

    return make
