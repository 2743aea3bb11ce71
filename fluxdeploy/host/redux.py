"""FLUX.1 Redux: pictures as text, behind the words of a prompt or without any.

Equal to diffusers' FluxPriorReduxPipeline before a FluxPipeline, for a bundle that was built with a
Redux. With n pictures, the embeddings of a prompt are read once for each of them:

    text   = sum of scale_i · [T5's S tokens, the P tokens of picture i]
    pooled = sum of pooled_scale_i · CLIP's

The ids of all of these tokens are zeros, and negative prompts have no pictures. Without a prompt,
what T5 and CLIP would give is zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_number, one_for_each
from fluxdeploy.bundle.boundary import REDUX
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.image_encoders import to_pixel_values
from fluxdeploy.host.input_images import to_pictures

__all__ = ["Redux", "read_redux"]

_MOST_SCALE = 1e3
_MOST_PICTURES = 64


@dataclass(frozen=True)
class Redux:
    """n pictures as text, for every prompt of a call.

    pixels: float32 [n, 3, H, W], as the component reads them. scales, pooled_scales: one for each.
    tokens: P, those that stand behind a prompt's.
    """

    pixels: NDArray[np.float32] = field(compare=False)
    scales: tuple[float, ...]
    pooled_scales: tuple[float, ...]
    tokens: int

    def joined(
        self, text: NDArray[np.float32], embeddings: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """T5's text embeddings [U, S, E] and those of the pictures [n, P, E], as [U, S + P, E]."""
        scales = np.array(self.scales, np.float32)
        pictures = np.einsum("n,npe->pe", scales, embeddings)
        behind = np.broadcast_to(pictures, (len(text), *pictures.shape))
        return np.concatenate([text * scales.sum(), behind], axis=1)

    def pooled(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """CLIP's embeddings [U, E'], as many times as there are pictures."""
        total: np.float32 = np.array(self.pooled_scales, np.float32).sum()
        return np.multiply(pooled, total, dtype=np.float32)


def read_redux(
    manifest: Manifest, image: object, scale: object, pooled_scale: object
) -> Redux | None:
    """What `redux_image`, `prompt_embeds_scale` and `pooled_prompt_embeds_scale` ask for.

    None without pictures. Raises `UsageError` for what cannot be, and for a bundle without a Redux.
    """
    if image is None:
        return None
    if manifest.redux is None:
        raise UsageError(
            "This bundle has no Redux, which `redux_image` takes. Build it again with --redux, or "
            "leave out `redux_image`."
        )
    pictures = to_pictures(image, "redux_image")
    if len(pictures) > _MOST_PICTURES:
        raise UsageError(
            f"`redux_image` has {len(pictures)} pictures; {_MOST_PICTURES} are the most."
        )
    (output,) = manifest.components[REDUX].outputs
    tokens = output.shape[1]
    assert isinstance(tokens, int)  # or the manifest is refused
    return Redux(
        to_pixel_values(pictures, manifest.redux),
        _scales("prompt_embeds_scale", scale, len(pictures)),
        _scales("pooled_prompt_embeds_scale", pooled_scale, len(pictures)),
        tokens,
    )


def _scales(name: str, given: object, count: int) -> tuple[float, ...]:
    """A scale for each picture, of one for all or a list."""
    values = one_for_each(
        name,
        given,
        count,
        f" for {count} pictures of `redux_image`. Give one number for all, or a list with one for "
        "each.",
    )
    return tuple(check_number(name, value, -_MOST_SCALE, _MOST_SCALE) for value in values)
