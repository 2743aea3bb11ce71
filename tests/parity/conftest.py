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
from tests.parity.controlnets import CASES

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


@pytest.fixture(scope="session")
def open_reference_controlled(
    open_reference: Callable[[str], Any], controlnet_folders: Callable[[str], tuple[Path, ...]]
) -> Callable[[str], Any]:
    """diffusers' pipeline of a case."""
    import diffusers

    @functools.cache
    def make(case: str) -> Any:
        parts = dict(open_reference(CASES[case][0]).components)
        for adapter in ("image_encoder", "feature_extractor"):
            del parts[adapter]
        nets = [
            diffusers.FluxControlNetModel.from_pretrained(folder)
            for folder in controlnet_folders(case)
        ]
        net = nets[0] if len(nets) == 1 else diffusers.FluxMultiControlNetModel(nets)
        pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=net)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def open_reference_adapted(
    checkpoint: Factory, ip_adapter_folder: Callable[[str], Path]
) -> Callable[..., Any]:
    """`open_reference_adapted(name, kind="FluxPipeline")`: diffusers' with the IP-Adapter."""
    import diffusers
    import torch

    @functools.cache
    def make(name: str, kind: str = "FluxPipeline") -> Any:
        pipe = getattr(diffusers, kind).from_pretrained(checkpoint(name))
        pipe.set_progress_bar_config(disable=True)
        folder = ip_adapter_folder(name)
        pipe.load_ip_adapter(
            folder,
            weight_name="ip_adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
            image_encoder_dtype=torch.float32,
        )
        return pipe

    return make
