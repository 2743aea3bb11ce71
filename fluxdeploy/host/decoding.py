"""From the last latents to pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.errors import EngineError
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.components import Run
from fluxdeploy.sampling.latents import unpack, unscale

__all__ = ["decode"]


def decode(
    tokens: NDArray[np.float32],
    height: int,
    width: int,
    spec: LatentSpec,
    run: Run,
    cancel: Checked,
) -> NDArray[np.float32]:
    """Pictures, float32 [B, H, W, 3] in 0..1, of packed latents [B, L, C].

    One at a time: the decoder's memory grows with the number of pixels, and it fills a device with
    one picture already. Raises `EngineError` for a decoder of other sizes than the manifest's.
    """
    latents = unscale(unpack(tokens, height, width, spec), spec)
    pictures = np.empty((len(tokens), height, width, 3), np.float32)
    for index, picture in enumerate(pictures):
        cancel.check(f"before decoding picture {index + 1} of {len(pictures)}")
        decoded = run("vae_decoder", {"latents": latents[index : index + 1]})["images"]
        if decoded.shape != (1, 3, height, width):
            raise EngineError(
                f"The vae_decoder gave {list(decoded.shape)} where a picture is "
                f"{[1, 3, height, width]}. Build the bundle again with `fluxdeploy build`."
            )
        np.clip(decoded[0].transpose(1, 2, 0) * 0.5 + 0.5, 0.0, 1.0, out=picture)
    return pictures
