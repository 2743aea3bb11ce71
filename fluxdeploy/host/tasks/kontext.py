"""Kontext: a picture is drawn after reference pictures, changed as the prompt says.

Equal to diffusers' FluxKontextPipeline, for checkpoints of FLUX.1 Kontext's kind: the tokens of the
references stand behind the latents in every step, with ids that tell them apart (arXiv 2506.15742).
A reference is the mean of its posterior; nothing is drawn for it. The picture has the size that is
asked for, and else the first reference's proportions, where diffusers draws what has `max_area`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_flag, check_integer
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.input_images import picture_size, to_pixels
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import encode
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.sampling.latents import latent_shape, pack, scale, token_grid
from fluxdeploy.sampling.noise import Generators
from fluxdeploy.sampling.rope import picture_ids

__all__ = ["Kontext"]

_TRAINED_AREA = 1024**2
_TRAINED_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184)),
    *((944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752)),
    *((1456, 720), (1504, 688), (1568, 672)),
)
"""Widths and heights of the references that FLUX.1 Kontext was trained with."""

_MOST_AREA = 1 << 26


@dataclass(frozen=True)
class Kontext(Task):
    """Pictures drawn after references, float32 [Bi, 3, H, W] in -1..1 each.

    Picture number k of the B has row k modulo Bi of every reference, as in diffusers.
    """

    name: ClassVar[str] = "kontext"
    chosen_by: ClassVar[tuple[str, ...]] = ("image",)
    options: ClassVar[Mapping[str, object]] = {"max_area": None, "auto_resize": True}
    components: ClassVar[tuple[str, ...]] = ("vae_encoder",)

    references: tuple[NDArray[np.float32], ...]

    @classmethod
    def size(
        cls,
        manifest: Manifest,
        height: int | None,
        width: int | None,
        arguments: Mapping[str, Any],
    ) -> tuple[int | None, int | None]:
        """What is asked for, else the first reference's; at `max_area` where that is given."""
        if height is None and width is None:
            height, width = _reference_sizes(manifest, arguments)[0]
        area = arguments["max_area"]
        if area is None:
            return height, width
        area = check_integer("max_area", area, manifest.latents.token_side**2, _MOST_AREA)
        height = manifest.defaults.height if height is None else check_integer("height", height, 1)
        width = manifest.defaults.width if width is None else check_integer("width", width, 1)
        aspect = width / height
        return _whole(manifest, round((area / aspect) ** 0.5), round((area * aspect) ** 0.5))

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> Kontext:
        """The task of a request with `image` and `auto_resize`."""
        references = tuple(
            to_pixels(given, *size)
            for given, size in zip(
                _by_place(arguments["image"]), _reference_sizes(manifest, arguments), strict=True
            )
        )
        count = len(references[0])
        if request.batch % count != 0:
            raise UsageError(
                f"There are {count} images for {request.batch} pictures. Give one for all, or as "
                "many as divide that number; a list of lists has several for one picture."
            )
        return cls(request, manifest, references)

    @property
    def reference_tokens(self) -> int:
        """R: the tokens of all references."""
        return sum(rows * columns for rows, columns in self._grids())

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """The VAE encoder is given one picture at a time, and the transformer longer rows."""
        request, spec = self.request, self.manifest.latents
        height, width = (max(x.shape[axis] for x in self.references) for axis in (2, 3))
        _, _, h, w = latent_shape(1, height, width, spec)
        rows, columns = token_grid(request.height, request.width, spec)
        tokens = rows * columns + self.reference_tokens
        return {
            "vae_encoder": {"H": height, "W": width, "h": h, "w": w},
            "transformer": {"L": tokens, "T": request.text_tokens + tokens},
        }

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """Noise of the seed, or the caller's latents, and the references' tokens behind it."""
        request, spec = self.request, self.manifest.latents
        axes = len(self.manifest.rope.axes_dims)
        tokens, ids = [], []
        for number, (images, grid) in enumerate(
            zip(self.references, self._grids(), strict=True), start=1
        ):
            mean, _ = encode(images, spec, run)
            known = pack(scale(mean, spec), spec)
            tokens.append(np.concatenate([known] * (request.batch // len(known))))
            ids.append(picture_ids(*grid, axes, number))
        if request.latents is not None:
            start = request.latents.copy()
        else:
            assert request.seed is not None  # without latents there is one
            shape = latent_shape(request.batch, request.height, request.width, spec)
            start = pack(Generators(request.seed).normal(shape), spec)
        return Start(
            start, sigmas, tokens=np.concatenate(tokens, axis=1), token_ids=np.concatenate(ids)
        )

    def _grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each reference's tokens."""
        spec = self.manifest.latents
        return [token_grid(x.shape[2], x.shape[3], spec) for x in self.references]


def _by_place(image: object) -> list[Any]:
    """What is given for the first reference of every picture, for the second, and so on."""
    if not isinstance(image, (list, tuple)) or not any(
        isinstance(each, (list, tuple)) for each in image
    ):
        return [image]
    sets = [list(each) if isinstance(each, (list, tuple)) else [each] for each in image]
    counts = {len(each) for each in sets}
    if len(counts) > 1 or 0 in counts:
        raise UsageError(
            f"`image` has lists of {' and '.join(map(str, sorted(counts)))} images. Give as many "
            "for every picture, and at least one."
        )
    return [list(place) for place in zip(*sets, strict=True)]


def _reference_sizes(manifest: Manifest, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of every reference, in whole tokens: those of the first picture's."""
    resize = check_flag("auto_resize", arguments["auto_resize"])
    sizes = []
    for place in _by_place(arguments["image"]):
        height, width = picture_size(place)
        if resize:
            height, width = _trained_size(manifest, width / height)
        sizes.append(_whole(manifest, height, width))
    return sizes


def _trained_size(manifest: Manifest, aspect: float) -> tuple[int, int]:
    """Height and width of the training size that is nearest in proportions.

    For bundles whose pictures are smaller or larger than FLUX.1's, it is as much smaller or larger.
    """
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in _TRAINED_SIZES)
    defaults = manifest.defaults
    ratio = (defaults.height * defaults.width / _TRAINED_AREA) ** 0.5
    return round(height * ratio), round(width * ratio)


def _whole(manifest: Manifest, height: int, width: int) -> tuple[int, int]:
    """The largest size in whole tokens that is no larger, and at least a token."""
    side = manifest.latents.token_side
    return max(side, height // side * side), max(side, width // side * side)
