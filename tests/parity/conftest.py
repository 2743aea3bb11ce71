"""Opened pipelines of the random checkpoints: ours, and diffusers' on the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.host.pipeline import FluxPipeline

Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def open_pipeline(bundle: Factory) -> Iterator[Callable[..., FluxPipeline]]:
    """`open_pipeline(name, layout="diffusers")`: our pipeline on a random checkpoint's bundle."""
    with ExitStack() as opened:

        @functools.cache
        def make(name: str, layout: str = "diffusers") -> FluxPipeline:
            return opened.enter_context(FluxPipeline.from_bundle(bundle(name, layout)))

        yield make


@pytest.fixture(scope="session")
def open_reference(checkpoint: Factory) -> Callable[[str], Any]:
    """`open_reference(name)`: diffusers' FluxPipeline on the same checkpoint."""

    @functools.cache
    def make(name: str) -> Any:
        from tests.support.checkpoints import load_diffusers

        return load_diffusers(checkpoint(name))

    return make
