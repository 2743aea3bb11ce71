"""Whether a call fits into memory, before it runs.

What is needed is reckoned and what is free changes, so only what is far beyond it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.tasks.task import Task
from fluxdeploy.host.tiles import SIDE, is_cost, vae_cost
from fluxdeploy.machine import read_memory, resident_memory
from fluxdeploy.sampling.latents import token_grid

__all__ = ["check_memory"]

_MARGIN = 1.5
"""Times the free memory that a call may seem to need: figures are off by as much."""

_HELP = {
    "the pictures": "Ask for fewer pictures or a smaller size.",
    "the transformer": "Ask for a smaller size or for fewer pictures, or set low_vram.",
    "the VAE": "Ask for a smaller size, or set low_vram.",
}


def check_memory(task: Task, held: int, latents_only: bool) -> None:
    """Raise `UsageError` for a call that needs far more memory than is free.

    held: bytes that the host holds for it; the largest run of an engine comes to it. Weights are
    not counted: they may be in memory already. What a bundle does not record counts as nothing.
    """
    memory = read_memory()
    if memory.available is None:
        return
    runs = {
        "the pictures": 0,
        "the transformer": _transformer(task),
        "the VAE": _vae(task, latents_only),
    }
    largest = max(runs, key=lambda name: runs[name])
    need = held + runs[largest]
    # What this process has is counted as free: engines that keep it take it again.
    free = memory.available + (resident_memory() or 0)
    if need <= _MARGIN * free + (memory.swap or 0):
        return
    if held > runs[largest]:
        largest = "the pictures"
    request = task.request
    raise UsageError(
        f"{request.batch} pictures of {request.width}x{request.height} pixels need about "
        f"{_gigabytes(need)} of memory, most of it for {largest}, and {_gigabytes(free)} are free. "
        f"{_HELP[largest]}"
    )


def _transformer(task: Task) -> int:
    """Bytes of one run of the transformer on a CPU; 0 where the bundle does not record them."""
    manifest, request = task.manifest, task.request
    recorded = manifest.provenance.get("transformer_bytes")
    costs = recorded if isinstance(recorded, Mapping) else {}
    token, pair = (costs.get(name) for name in ("per_token", "per_pair_of_tokens"))
    if not is_cost(token) or not is_cost(pair):
        return 0
    rows, columns = token_grid(request.height, request.width, manifest.latents)
    tokens = request.text_tokens + rows * columns + task.reference_tokens
    return _together(manifest, request.batch) * tokens * (token + pair * tokens)


def _together(manifest: Manifest, batch: int) -> int:
    """Pictures that the transformer is run on at once, by the engine that takes the fewest."""
    record = manifest.components.get("transformer")
    engines = () if record is None else record.engines
    most = [engine.dimensions["B"].max for engine in engines if "B" in engine.dimensions]
    parts = max((-(-batch // each) for each in most), default=1)
    return -(-batch // parts)


def _vae(task: Task, latents_only: bool) -> int:
    """Bytes of the largest run of the VAE, one picture at a time and at most a tile of it."""
    side = SIDE * task.manifest.latents.spatial_factor
    pixels = min(task.request.height, side) * min(task.request.width, side)
    halves = [*task.components, *(() if latents_only else ("vae_decoder",))]
    return max(((vae_cost(task.manifest, half) or 0) * pixels for half in halves), default=0)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
