"""Latents between pixels and tokens: sizes, packing, the VAE's scale and its posterior.

A picture of height x width pixels has h x w latents of `channels` channels, with
h = height / spatial_factor; `patch_size`^2 neighbours are packed into one token, so that
L = (h / patch_size) * (w / patch_size).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer, shown
from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.errors import UsageError

__all__ = [
    "check_size",
    "latent_shape",
    "pack",
    "sample_posterior",
    "scale",
    "token_grid",
    "unpack",
    "unscale",
]


def check_size(height: int, width: int, spec: LatentSpec) -> None:
    """Raise `UsageError` unless both sides are positive multiples of a token's pixels (16)."""
    height, width = check_integer("height", height, None), check_integer("width", width, None)
    side = spec.token_side
    if height > 0 and width > 0 and height % side == 0 and width % side == 0:
        return
    nearest = " or ".join(
        dict.fromkeys(
            f"{shown(_nearest(width, side, up))}x{shown(_nearest(height, side, up))}"
            for up in (False, True)
        )
    )
    raise UsageError(
        f"A picture of {shown(width)}x{shown(height)} pixels (width x height) cannot be made: both "
        f"sides must be positive multiples of {side}. The nearest sizes are {nearest}."
    )


def _nearest(pixels: int, side: int, up: bool) -> int:
    """The multiple of `side` at or next to `pixels`, below or above, and at least `side`."""
    return max(side, (pixels + side - 1 if up else pixels) // side * side)


def token_grid(height: int, width: int, spec: LatentSpec) -> tuple[int, int]:
    """Rows and columns of image tokens in a picture of height x width pixels."""
    side = spec.token_side
    return height // side, width // side


def latent_shape(
    batch: int, height: int, width: int, spec: LatentSpec
) -> tuple[int, int, int, int]:
    """The shape [B, C, h, w] of a batch's latents, for height x width pixels."""
    return batch, spec.channels, height // spec.spatial_factor, width // spec.spatial_factor


def pack(latents: NDArray[np.float32], spec: LatentSpec) -> NDArray[np.float32]:
    """Latents [B, C, h, w] as tokens [B, L, C * patch_size^2]: row by row, channel first."""
    batch, channels, height, width = latents.shape
    patch = spec.patch_size
    rows, columns = height // patch, width // patch
    patches = latents.reshape(batch, channels, rows, patch, columns, patch)
    tokens = patches.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tokens).reshape(batch, rows * columns, channels * patch * patch)


def unpack(
    tokens: NDArray[np.float32], height: int, width: int, spec: LatentSpec
) -> NDArray[np.float32]:
    """The inverse of `pack`: tokens of height x width pixels, [B, L, ...], as [B, C, h, w]."""
    batch = tokens.shape[0]
    patch = spec.patch_size
    rows, columns = token_grid(height, width, spec)
    patches = tokens.reshape(batch, rows, columns, spec.channels, patch, patch)
    latents = patches.transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(latents).reshape(latent_shape(batch, height, width, spec))


def unscale(latents: NDArray[np.float32], spec: LatentSpec) -> NDArray[np.float32]:
    """From the transformer's scale to the VAE's: z / scaling_factor + shift_factor, same shape."""
    return latents / np.float32(spec.scaling_factor) + np.float32(spec.shift_factor)


def scale(latents: NDArray[np.float32], spec: LatentSpec) -> NDArray[np.float32]:
    """The inverse of `unscale`: (z - shift_factor) * scaling_factor, same shape."""
    return (latents - np.float32(spec.shift_factor)) * np.float32(spec.scaling_factor)


def sample_posterior(
    mean: NDArray[np.float32], logvar: NDArray[np.float32], noise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A draw of the VAE encoder's normal distribution: mean + exp(logvar / 2) * noise.

    The log-variance is cut to -30..20, as diffusers does.
    """
    deviation: NDArray[np.float32] = np.exp(np.float32(0.5) * np.clip(logvar, -30.0, 20.0))
    return mean + deviation * noise
