"""The manifest of a bundle that has been made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fluxdeploy import __version__
from fluxdeploy.build.checkpoint import limits
from fluxdeploy.build.keys import tool_versions
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    Defaults,
    Manifest,
    QualityRecord,
    TokenizerRecord,
)
from fluxdeploy.demo import DEFAULT_CHECKPOINT, DEMO_CHECKPOINTS
from fluxdeploy.precision import PRECISIONS

__all__ = ["describe"]


def describe(
    run: BuildRun,
    tokenizers: Mapping[str, TokenizerRecord],
    components: Mapping[str, ComponentRecord],
) -> Manifest:
    """All that a host must know of what a run has made."""
    checkpoint, request = run.spec.checkpoint, run.spec.request
    guided = checkpoint.transformer.guidance_embedding
    row = PRECISIONS[components["transformer"].precision]
    name = request.checkpoint or DEFAULT_CHECKPOINT
    limit = limits(checkpoint)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux.1",
        variant="dev" if guided else "schnell",
        guidance_embedding=guided,
        components=components,
        latents=checkpoint.latents,
        rope=checkpoint.rope,
        schedule=run.spec.schedule,
        tokenizers=tokenizers,
        defaults=_defaults(run, components),
        quality=QualityRecord(row.min_psnr, row.min_ssim, row.min_sqnr),
        provenance={
            "checkpoint": {
                "name": name if name in DEMO_CHECKPOINTS else checkpoint.root.resolve().name,
                "layout": checkpoint.layout,
                "sha256": run.hashes.digest,
            },
            **({} if limit is None else {"limits": limit}),
            "requested_precision": request.precision,
            "tools": {"fluxdeploy": __version__} | tool_versions(),
        },
    )


def _defaults(run: BuildRun, components: Mapping[str, ComponentRecord]) -> Defaults:
    """The checkpoint's, with the picture that the engines are tuned for: they may take no other."""
    sides = components["vae_decoder"].engines[0].dimensions
    return replace(run.spec.checkpoint.defaults, height=sides["H"].opt, width=sides["W"].opt)
