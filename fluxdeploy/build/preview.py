"""The linear map from latents to colours that cheap previews take, fitted to a checkpoint's VAE."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import LatentSpec, PreviewSpec
from fluxdeploy.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, arrange, draw
from fluxdeploy.errors import NumericError
from fluxdeploy.sampling.latents import scale, unscale

__all__ = ["fit_preview", "linear_map"]

Floats = NDArray[np.float32]

_SIDE = 96
"""Pixels: two large shapes fit. FLUX.1's own VAE takes a second or two for each on a CPU."""

_SCENES, _FIELDS = 4, 1
_GRAIN = 0.05

_RIDGE = 1e-3
"""Of the latents' own variance: directions that the pictures do not show stay without a colour."""

_DIGITS = 4


def fit_preview(run: BuildRun) -> PreviewSpec:
    """Fit the map to what the decoder makes of latents, in float32.

    They are those of pictures with flat and with flowing colours; without an encoder, patches of
    noise. Raises `NumericError` where the VAE gives what is no number.
    """
    from exporters.components.run import run_samples
    from exporters.components.vae import VAE_DECODER, VAE_ENCODER

    checkpoint = run.spec.checkpoint
    spec = checkpoint.latents
    side = math.ceil(_SIDE / spec.token_side) * spec.token_side
    task = run.progress.task("Fitting the preview")
    if VAE_ENCODER.present(checkpoint):
        images = {"images": np.concatenate(_pictures(side))}
        (moments,) = run_samples(*VAE_ENCODER.source(checkpoint, "fp32"), [images])
        latents = scale(moments["mean"].astype(np.float32), spec)
    else:
        latents = np.concatenate(_patches(side // spec.spatial_factor, spec.channels))
    inputs = {"latents": unscale(latents, spec)}
    (decoded,) = run_samples(*VAE_DECODER.source(checkpoint, "fp32"), [inputs])
    found = linear_map(latents, decoded["images"].astype(np.float32), spec)
    task.finish()
    return found


def linear_map(latents: Floats, images: Floats, spec: LatentSpec) -> PreviewSpec:
    """The map that comes nearest to `images`, [B, 3, H, W] in -1..1, of `latents`, [B, C, h, w].

    Least squares, over the mean of each latent's pixels. Raises `NumericError`.
    """
    batch, channels, height, width = latents.shape
    factor = spec.spatial_factor
    pixels = images.reshape(batch, 3, height, factor, width, factor).mean(axis=(3, 5))
    given = latents.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    wanted = np.clip(pixels * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1).reshape(-1, 3)
    if not (np.isfinite(given).all() and np.isfinite(wanted).all()):
        raise NumericError(
            "The VAE makes NaN or infinity of pictures in float32. The checkpoint is damaged: "
            "fetch its files again."
        )
    middle, mean = given.mean(axis=0), wanted.mean(axis=0)
    given, wanted = given - middle, wanted - mean
    spread = given.T @ given
    # What never changes has no spread at all.
    ridge = _RIDGE * max(np.trace(spread) / channels, 1e-12)
    matrix = np.linalg.solve(spread + ridge * np.eye(channels), given.T @ wanted)
    return PreviewSpec(tuple(map(_rounded, matrix)), _rounded(mean - middle @ matrix))


def _rounded(row: NDArray[np.float64]) -> tuple[float, ...]:
    """Fewer digits than differ between machines."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in row)


def _pictures(side: int) -> list[Floats]:
    """Pictures of side x side pixels, float32 [1, 3, side, side] in -1..1, always the same."""
    found = [_scene(number, side) for number in range(_SCENES)]
    found += [_field(number, side) for number in range(_FIELDS)]
    return [
        np.ascontiguousarray(picture.transpose(2, 0, 1))[None] * np.float32(2) - np.float32(1)
        for picture in found
    ]


def _scene(number: int, side: int) -> Floats:
    """Two flat shapes on a background: all eight colours are in four of them."""
    colours, shapes = list(COLOURS), list(SHAPES)
    things = tuple(
        Thing(colours[index % len(colours)], shapes[index % len(shapes)], "large")
        for index in (2 * number, 2 * number + 1)
    )
    background = list(BACKGROUNDS)[number % len(BACKGROUNDS)]
    drawing = arrange(
        Scene(things, background=background), side, side, np.random.default_rng(number)
    )
    return draw(drawing).astype(np.float32) / np.float32(255)


def _field(number: int, side: int) -> Floats:
    """Colours that flow into each other, with a grain."""
    random = np.random.RandomState(number)
    cells = random.randint(0, 256, (number + 3, number + 3, 3)).astype(np.uint8)
    smooth = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
    grain = _GRAIN * random.standard_normal((side, side, 1))
    return np.clip(np.asarray(smooth) / 255 + grain, 0, 1).astype(np.float32)


def _patches(side: int, channels: int) -> list[Floats]:
    """Latents of side x side, float32 [1, C, side, side]: noise, most of it in patches."""
    random = np.random.RandomState(0)
    found = []
    for _ in range(_SCENES):
        cells = random.standard_normal((1, channels, side // 4 + 1, side // 4 + 1))
        wide = cells.repeat(4, axis=2).repeat(4, axis=3)[:, :, :side, :side]
        grain = 0.3 * random.standard_normal(wide.shape)
        found.append((wide + grain).astype(np.float32))
    return found
