"""Contenders that run diffusers' pipeline: eager, torch.compile, OpenVINO's conversion, optimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxdeploy.bench.contender import LoadedContender
from fluxdeploy.bench.job import PEERS, Job
from fluxdeploy.bench.peers.openvino import openvino_loader
from fluxdeploy.bench.peers.optimum import optimum_loader
from fluxdeploy.bench.stopwatch import Stopwatch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DiffusersContender"]


class DiffusersContender(LoadedContender):
    """diffusers' `FluxPipeline`, with a stopwatch around its networks."""

    def __init__(self, job: Job, watch: Stopwatch) -> None:
        import torch

        super().__init__(job, watch)
        torch.set_num_threads(job.threads)
        if job.device != "cpu":
            torch.cuda.set_device(job.gpu)  # what "cuda" means from here on
        load = _LOADERS.get(job.contender.partition("-")[0], _eager_loader)(job)
        with watch.component("load"):
            self._pipe = load()
        self._pipe.set_progress_bar_config(disable=True)
        self._latents = torch.from_numpy(np.load(job.latents))
        if job.contender.startswith("compile"):
            transformer = self._pipe.transformer
            transformer.forward = torch.compile(transformer.forward)
        self._watch_parts()

    def _call(self, **arguments: Any) -> list[Image]:
        import torch

        def on_step_end(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> Any:
            self._watch.end_step()
            return state

        with torch.inference_mode():
            images: list[Image] = self._pipe(
                **arguments,
                latents=self._latents,
                callback_on_step_end=on_step_end,
            ).images
        return images

    def _watch_parts(self) -> None:
        """Time the networks, by our names for them.

        `forward` is replaced on the instances. Hooks would break torch.compile's graph in two.
        """
        pipe = self._pipe
        for name, part in (("clip", pipe.text_encoder), ("t5", pipe.text_encoder_2)):
            part.forward = self._watch.wrap(name, part.forward)
        pipe.vae.decode = self._watch.wrap("vae_decoder", pipe.vae.decode)
        step = self._watch.wrap("transformer", pipe.transformer.forward)

        def forward(*arguments: Any, **named: Any) -> Any:
            output = step(*arguments, **named)
            self._keep_first(lambda: output[0].float().cpu())
            return output

        pipe.transformer.forward = forward


def _eager_loader(job: Job) -> Callable[[], Any]:
    """What opens the pipeline, with all imports done."""
    import torch
    from diffusers import FluxPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[PEERS[job.contender].precision]
    return lambda: FluxPipeline.from_pretrained(job.checkpoint, torch_dtype=dtype).to(job.device)


_LOADERS = {"openvino": openvino_loader, "optimum": optimum_loader}
"""By the first word of a peer's name, where it is not `_eager_loader`."""
