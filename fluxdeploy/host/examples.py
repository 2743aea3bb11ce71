"""What a bundle's task takes beside a prompt, for whoever tries the bundle out."""

from __future__ import annotations

from typing import Any

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.sampling.examples import example_edges, example_mask, example_picture

__all__ = ["example_arguments", "example_control", "example_seen", "example_variation"]


def example_arguments(manifest: Manifest, height: int, width: int) -> dict[str, Any]:
    """Arguments of `FluxPipeline.__call__` for a picture of so many pixels.

    They are for what the bundle's model was trained for; nothing where that is text to image.
    """
    if "fill" in manifest.tasks:
        return {
            "image": example_picture(height, width),
            "mask_image": example_mask(height, width),
        }
    if "control" in manifest.tasks:
        return {"control_image": example_edges(height, width)}
    if "kontext" in manifest.tasks:
        return {"image": example_picture(height, width), "auto_resize": False}
    return {}


def example_control(manifest: Manifest, height: int, width: int) -> dict[str, Any]:
    """Arguments for a picture with all ControlNets of a bundle; nothing where it has none."""
    records = manifest.controlnets
    if not records:
        return {}
    edges = example_edges(height, width)
    mode = 0 if any(record.modes for record in records) else None
    return {"control_image": [edges] * len(records), "control_mode": mode}


def example_seen(manifest: Manifest) -> dict[str, Any]:
    """Arguments for a picture with the IP-Adapter of a bundle; nothing where it has none."""
    if manifest.ip_adapter is None:
        return {}
    height, width = manifest.ip_adapter.pixels.size
    return {"ip_adapter_image": example_picture(height, width)}


def example_variation(manifest: Manifest, height: int, width: int) -> dict[str, Any]:
    """Arguments for a picture that varies another one; nothing where a bundle has no Redux."""
    return {} if manifest.redux is None else {"redux_image": example_picture(height, width)}
