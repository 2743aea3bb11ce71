"""Masks as FLUX.1 Fill reads them: every pixel of a token is a channel, and what is hidden is grey.

Equal to diffusers' FluxFillPipeline.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.sampling.latents import pack

__all__ = ["hide", "mask_channels"]


def hide(images: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Pictures [B, 3, H, W] in -1..1, with 0 where `masks` [B, H, W] are true."""
    return images * ~masks[:, None]


def mask_channels(masks: NDArray[np.bool_], spec: LatentSpec) -> NDArray[np.float32]:
    """Masks [B, H, W] as tokens [B, L, spec.mask_channels]: 1 where they are true.

    The pixels that a latent stands for become its channels, row by row, which are packed as latents
    are.
    """
    batch, height, width = masks.shape
    side = spec.spatial_factor
    cells = masks.reshape(batch, height // side, side, width // side, side)
    folded = cells.transpose(0, 2, 4, 1, 3).reshape(batch, side**2, height // side, width // side)
    return pack(folded.astype(np.float32), spec)
