"""The manifest of a bundle that has been made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy import __version__
from fluxdeploy.build.checkpoint import CheckpointHashes
from fluxdeploy.build.keys import tool_versions
from fluxdeploy.build.plan.footprint import WIDTHS
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    ControlNetRecord,
    IpAdapterRecord,
    Manifest,
    PreviewSpec,
    QualityRecord,
    TokenizerRecord,
)
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.kernels import CallSizes
from fluxdeploy.precision import PRECISIONS

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

__all__ = ["SOURCES", "checkpoint_origin", "describe", "described_tasks", "sources"]

SOURCES = ("checkpoint", "loras", "controlnets", "ip_adapter", "redux")
"""Entries of `provenance` that tell what a bundle is made from."""

_SPREAD = 3.0
"""dB between a layer's noise over some inputs and over others, at most."""


def describe(
    run: BuildRun,
    tokenizers: Mapping[str, TokenizerRecord],
    components: Mapping[str, ComponentRecord],
    preview: PreviewSpec,
) -> Manifest:
    """All that a host must know of what a run has made."""
    checkpoint, request = run.spec.checkpoint, run.spec.request
    guided = checkpoint.transformer.guidance_embedding
    transformer = components["transformer"]
    row = PRECISIONS[transformer.precision]
    promise = Promise() if transformer.recipe is None else transformer.recipe.promise
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux.1",
        variant=_variant(checkpoint),
        guidance_embedding=guided,
        components=components,
        latents=checkpoint.latents,
        rope=checkpoint.rope,
        schedule=run.spec.schedule,
        tokenizers=tokenizers,
        defaults=run.spec.defaults,
        quality=QualityRecord(promise.psnr or row.min_psnr, row.min_ssim, _least_sqnr(transformer)),
        provenance={
            **sources(checkpoint, request.checkpoint, run.hashes),
            "requested_precision": request.precision,
            "transformer_bytes": _transformer_bytes(run),
            "vae_bytes_per_pixel": _vae_bytes_per_pixel(run),
            "tools": {"fluxdeploy": __version__} | tool_versions(),
        },
        tasks=described_tasks(checkpoint),
        preview=preview,
        controlnets=tuple(
            ControlNetRecord(name, config.modes)
            for name, config in zip(
                checkpoint.controlnet_parts, checkpoint.controlnets, strict=True
            )
        ),
        ip_adapter=_ip_adapter(checkpoint),
        redux=None if checkpoint.redux is None else checkpoint.redux.pixels,
    )


def sources(
    checkpoint: Checkpoint, name: str | None, hashes: CheckpointHashes | None = None
) -> dict[str, object]:
    """What is recorded of all that a bundle is made from; without hashes, its names alone.

    name: what the checkpoint was asked for by. None is the default.
    """
    return {
        "checkpoint": checkpoint_origin(name or DEFAULT_CHECKPOINT, checkpoint, hashes),
        **({"loras": [asdict(lora) for lora in checkpoint.loras]} if checkpoint.loras else {}),
        **(
            {"controlnets": _controlnet_files(checkpoint, hashes)} if checkpoint.controlnets else {}
        ),
        **_ip_adapter_files(checkpoint, hashes),
        **({"redux": _redux_files(checkpoint, hashes)} if checkpoint.redux else {}),
    }


def described_tasks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the bundle does: a VAE without an encoder leaves text to image alone."""
    from exporters.checkpoint.tasks import TASKS

    tasks = TASKS[checkpoint.task] if checkpoint.vae.encoder else ("text to image",)
    return (*tasks, "controlnet") if checkpoint.controlnets else tasks


def _controlnet_files(
    checkpoint: Checkpoint, hashes: CheckpointHashes | None
) -> list[dict[str, object]]:
    """The name of each ControlNet's folder, and the SHA-256 of its weight files."""
    return [
        {"name": folder, "sha256": _hashes(checkpoint, hashes, name)}
        for folder, name in zip(
            checkpoint.controlnet_folders, checkpoint.controlnet_parts, strict=True
        )
    ]


def _ip_adapter_files(checkpoint: Checkpoint, hashes: CheckpointHashes | None) -> dict[str, object]:
    """The name of the IP-Adapter's file, its SHA-256 and its image encoder's; nothing without."""
    name = checkpoint.ip_adapter_name
    if name is None:
        return {}
    parts = ("ip_adapter", "ip_adapter_encoder")
    own, encoder = (_hashes(checkpoint, hashes, part) for part in parts)
    return {"ip_adapter": {"name": name, "sha256": own, "image_encoder": encoder}}


def _ip_adapter(checkpoint: Checkpoint) -> IpAdapterRecord | None:
    from exporters.checkpoint.ip_adapter import adapter_pixels

    encoder = checkpoint.ip_adapter_encoder
    return None if encoder is None else IpAdapterRecord(adapter_pixels(encoder))


def _redux_files(checkpoint: Checkpoint, hashes: CheckpointHashes | None) -> dict[str, object]:
    """The name of the Redux's folder, and the SHA-256 of its weight files."""
    from exporters.checkpoint.checkpoint import REDUX

    return {"name": checkpoint.redux_folder, "sha256": _hashes(checkpoint, hashes, REDUX)}


def _hashes(checkpoint: Checkpoint, hashes: CheckpointHashes | None, part: str) -> list[str]:
    if hashes is None:
        return []
    tensors = checkpoint.parts[part].weights.values()
    files = {Path(os.path.realpath(tensor.file)) for tensor in tensors}
    return sorted(hashes.files[file] for file in files)


def _variant(checkpoint: Checkpoint) -> str:
    """FLUX.1's name for such a checkpoint."""
    if checkpoint.task != "text to image":
        return checkpoint.task
    return "dev" if checkpoint.transformer.guidance_embedding else "schnell"


def _transformer_bytes(run: BuildRun) -> dict[str, int]:
    """What a picture takes of the transformer's memory on a CPU: a T + b T² for T tokens.

    Nothing but for ONNX Runtime, whose memory was measured: a host refuses what does not fit.
    """
    for component in run.spec.components:
        if component.name == "transformer" and component.runtime.name == "onnxruntime":
            one, two = (
                component.export.component.activations(
                    run.spec.checkpoint,
                    CallSizes(1, 0, tokens, 1),
                    component.kernels,
                    WIDTHS[component.compute],
                )
                for tokens in (1, 2)
            )
            pair = (two - 2 * one) // 2
            return {"per_token": one - pair, "per_pair_of_tokens": pair}
    return {}


def _vae_bytes_per_pixel(run: BuildRun) -> dict[str, int]:
    """What each half of the VAE takes of memory where it runs on a CPU, by its usual picture."""
    checkpoint, defaults = run.spec.checkpoint, run.spec.defaults
    side = checkpoint.latents.token_side
    tokens = (defaults.height // side) * (defaults.width // side)
    sizes = CallSizes(1, defaults.max_sequence_length, tokens, defaults.num_inference_steps)
    return {
        component.name: component.export.component.activations(
            checkpoint, sizes, component.kernels, WIDTHS[component.compute]
        )
        // (tokens * side**2)
        for component in run.spec.components
        if component.export.component.part == "vae" and set(component.targets) == {"cpu"}
    }


def _least_sqnr(transformer: ComponentRecord) -> float | None:
    """What a layer has to keep: the precision's, or less where its numbers take that."""
    usual = PRECISIONS[transformer.precision].min_sqnr
    found = None if transformer.recipe is None else transformer.recipe.after
    if usual is None or found is None or found.worst_layer is None:
        return usual
    return round(min(usual, found.worst_layer - _SPREAD), 1)


def checkpoint_origin(
    name: str, checkpoint: Checkpoint, hashes: CheckpointHashes | None
) -> dict[str, object]:
    """What is recorded of the checkpoint: of a hub's repository its id and commit too.

    Of parts that were stored in fewer bits, the types that they were stored in.
    """
    if checkpoint.revision is not None:
        name = name.partition("@")[0]
    elif name not in DEMO_CHECKPOINTS:
        name = checkpoint.root.resolve().name
    origin: dict[str, object] = {
        "name": name,
        "layout": checkpoint.layout,
        **({} if hashes is None else {"sha256": hashes.digest}),
    }
    if checkpoint.revision is not None:
        origin["revision"] = checkpoint.revision
    if checkpoint.rounded:
        origin["stored_as"] = {part: ", ".join(t) for part, t in checkpoint.rounded.items()}
    return origin
