"""What a call asks of the queue: its work, and the memory that it holds from its first step on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fluxdeploy.bundle.boundary import RESIDUALS, SEEN
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.tasks.task import Task
from fluxdeploy.host.turns import Demand, Priority
from fluxdeploy.sampling.latents import latent_shape, token_grid
from fluxdeploy.sampling.sampler import load_sampler

__all__ = ["demand"]

_COPIES = 8
"""Of the latents: the noise, the picture's, the sampler's, the velocities."""


def demand(task: Task, priority: Priority, lora_bytes: int = 0, seen_tokens: int = 0) -> Demand:
    """The demand of a task: pixels times evaluations, of both prompts where guidance takes two.

    The bytes are those that the host holds while other calls go first: latents, pictures, what the
    conditioner gives for all steps, what ControlNets and IP-Adapters give the transformer, and for
    each prompt a copy of the LoRAs' `lora_bytes`. Engines hold their own besides. seen_tokens: of
    the pictures that an IP-Adapter is given together.
    """
    request, manifest = task.request, task.manifest
    sides = 1 if request.negative is None else 2
    batch, height, width = request.batch, request.height, request.width
    pixels = batch * height * width
    prompts = sides * len(request.text.distinct)
    latents = math.prod(latent_shape(batch, height, width, manifest.latents))
    numbers = _COPIES * latents + 3 * pixels + prompts * _conditioned(manifest, task)
    numbers += _given(manifest, task, RESIDUALS, {})
    # Where nothing is seen there is one token of zeros.
    numbers += sides * _given(manifest, task, SEEN, {"V": max(1, seen_tokens)})
    rows, columns = token_grid(height, width, manifest.latents)
    longer = 1 + task.reference_tokens / (rows * columns)
    each = sides * pixels * longer * task.evaluations / max(1, task.steps)
    return Demand(priority, task.steps, each, 4 * numbers + sides * lora_bytes)


def _given(manifest: Manifest, task: Task, names: Sequence[str], more: Mapping[str, int]) -> int:
    """How many numbers other networks give the transformer for a call, or stand there as zeros.

    more: sizes that are not the call's own.
    """
    request = task.request
    record = manifest.components.get("transformer")
    sizes = {
        "B": request.batch,
        "L": math.prod(token_grid(request.height, request.width, manifest.latents)),
        **more,
    }
    return sum(
        math.prod(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in (() if record is None else record.inputs)
        if spec.name in names
    )


def _conditioned(manifest: Manifest, task: Task) -> int:
    """How many numbers the conditioner gives for a prompt."""
    record = manifest.components.get("conditioner")
    levels = load_sampler(task.request.sampler).levels(np.zeros(task.steps + 1, np.float32))
    sizes = {"B": 1, "N": len(levels), "S": task.request.text_tokens}
    return sum(
        math.prod(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in (() if record is None else record.outputs)
    )
