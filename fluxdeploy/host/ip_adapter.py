"""The pictures that an IP-Adapter is given: read, encoded, and made into what blocks attend to.

As in diffusers, where a call with negative prompts says what one side sees, the other sees a black
picture. A call that gives no picture at all draws as the model without an IP-Adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.base import Array, Engine
from fluxdeploy.arguments import check_number, one_for_each
from fluxdeploy.bundle.boundary import SEEN
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.image_encoders import to_pixel_values
from fluxdeploy.host.input_images import to_pictures
from fluxdeploy.host.numbers import read_numbers
from fluxdeploy.host.request import GenerationRequest

__all__ = ["AdapterInputs", "Seen", "read_adapter", "zero_seen"]

ENCODER, ADAPTER = "ip_adapter_encoder", "ip_adapter"

_MOST_SCALE = 1e3


@dataclass(frozen=True)
class Seen:
    """What blocks attend to, of U sets of pictures, for the B pictures of a call.

    inputs: `ip_keys` and `ip_values`, float32 [n, U, V, D], for the transformer. pictures: [B],
    which of the U each sees.
    """

    inputs: Mapping[str, NDArray[np.float32]]
    pictures: NDArray[np.intp]

    def of(self, part: slice) -> dict[str, Array]:
        """The transformer's inputs for a part of the batch."""
        rows = self.pictures[part]
        return {name: np.take(values, rows, axis=1) for name, values in self.inputs.items()}


@dataclass(frozen=True, eq=False)
class _Given:
    """U sets of k pictures, each seen together: pixel values float32 [U·k, 3, H, W], or embeddings
    float32 [U·k, E]."""

    together: int
    pixels: NDArray[np.float32] | None = None
    embeds: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        found = self.embeds if self.pixels is None else self.pixels
        assert found is not None  # one of them is there
        return len(found) // self.together


@dataclass(frozen=True, eq=False)
class AdapterInputs:
    """What a call's prompts see, and its negative prompts where there are any.

    scales: float32 [n], what the values of each block are multiplied with. batch: B. tokens: V, of
    the pictures that are seen together, the most of a side.
    """

    sides: tuple[_Given, ...] = ()
    scales: NDArray[np.float32] | None = None
    batch: int = 0
    tokens: int = 0
    notices: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """What the call needs of a bundle for it."""
        encodes = any(given.pixels is not None for given in self.sides)
        return (*([ENCODER] if encodes else ()), *([ADAPTER] if self.sides else ()))

    def engine_sizes(self) -> dict[str, dict[str, int]]:
        """What components are asked for, by the symbols of the manifest."""
        sizes: dict[str, dict[str, int]] = {name: {} for name in self.components}
        return {**sizes, "transformer": {"V": self.tokens}} if self.sides else sizes

    def encode(self, run: Run) -> list[Seen | None]:
        """What each side sees; nothing of a call without pictures."""
        return [self._see(given, run) for given in self.sides] or [None, None]

    def _see(self, given: _Given, run: Run) -> Seen:
        embeds = given.embeds
        if given.pixels is not None:
            embeds = run(ENCODER, {"pixel_values": given.pixels})["image_embeds"]
        assert embeds is not None
        assert self.scales is not None  # there are pictures
        outputs = run(ADAPTER, {"image_embeds": embeds})
        keys, values = (_together(outputs[name], len(given)) for name in SEEN)
        # Attention is linear in them.
        values = values * self.scales[:, None, None, None]
        pictures = np.repeat(np.arange(len(given)), self.batch // len(given))
        return Seen(dict(zip(SEEN, (keys, values), strict=True)), pictures)


def _together(values: NDArray[np.float32], sets: int) -> NDArray[np.float32]:
    """Keys or values [n, U·k, p, D] of pictures as those of U sets, [n, U, k·p, D]."""
    blocks, _, _, width = values.shape
    return values.reshape(blocks, sets, -1, width)


def read_adapter(
    request: GenerationRequest, manifest: Manifest, pictures: Mapping[str, Any], scale: object
) -> AdapterInputs:
    """What a call gives for the IP-Adapter of its bundle.

    pictures: `ip_adapter_image`, `ip_adapter_image_embeds`, and the same two of the negative
    prompts. scale: `ip_adapter_scale`. Raises `UsageError` for what cannot be, and for a bundle
    without one.
    """
    given = [name for name, value in pictures.items() if value is not None]
    idle = [] if given or _is_one(scale) else ["`ip_adapter_scale` does nothing without a picture."]
    if manifest.ip_adapter is None:
        if given:
            raise UsageError(
                f"`{given[0]}` is for an IP-Adapter, which this bundle has not. Leave it out, or "
                "build the bundle with `fluxdeploy build --ip-adapter`."
            )
        return AdapterInputs(notices=tuple(idle))
    positive, negative = (
        _read_side(request, manifest, pictures, side) for side in ("", "negative_")
    )
    scales = _read_scales(manifest, scale)
    sides: tuple[_Given, ...] = ()
    if request.negative is None:
        idle += [
            f"`{name}` does nothing without `negative_prompt` and a `true_cfg_scale` above 1."
            for name in given
            if name.startswith("negative_")
        ]
        sides = () if positive is None else (positive,)
    elif given:
        sides = (positive or _black(manifest), negative or _black(manifest))
    tokens = int(manifest.components[ADAPTER].outputs[0].shape[2])
    most = max((given.together for given in sides), default=0) * tokens
    return AdapterInputs(sides, scales, request.batch, most, tuple(idle))


def _is_one(scale: object) -> bool:
    return isinstance(scale, (int, float)) and scale == 1


def _read_side(
    request: GenerationRequest, manifest: Manifest, pictures: Mapping[str, Any], side: str
) -> _Given | None:
    """The pictures of the prompts, or of the negative ones; None where there are none."""
    name, name_of_embeds = f"{side}ip_adapter_image", f"{side}ip_adapter_image_embeds"
    image, embeds = pictures[name], pictures[name_of_embeds]
    if image is None and embeds is None:
        return None
    if image is not None and embeds is not None:
        raise UsageError(f"`{name}` and `{name_of_embeds}` are both given. Give one of them.")
    if image is not None:
        assert manifest.ip_adapter is not None  # or the call was refused
        together, found = _read_pictures(name, image)
        given = _Given(together, pixels=to_pixel_values(found, manifest.ip_adapter.pixels))
    else:
        given = _read_embeds(manifest, name_of_embeds, embeds)
    prompts = len(request.text)
    if len(given) not in (1, prompts, request.batch):
        raise UsageError(
            f"`{name if embeds is None else name_of_embeds}` has {len(given)} entries for "
            f"{prompts} prompts and {request.batch} pictures to draw. Give one for all, one a "
            "prompt or one a picture; a list of lists has several that are seen together."
        )
    return given


def _read_pictures(name: str, image: Any) -> tuple[int, list[Image.Image]]:
    """How many pictures are seen together, and all of them, set by set."""
    several = isinstance(image, (list, tuple))
    if not several or not any(isinstance(each, (list, tuple)) for each in image):
        return 1, to_pictures(image, name)
    sets = [to_pictures(each, name) for each in image]
    counts = {len(each) for each in sets}
    if len(counts) > 1:
        raise UsageError(
            f"`{name}` has lists of {' and '.join(map(str, sorted(counts)))} pictures. Give as "
            "many in each."
        )
    return counts.pop(), [picture for each in sets for picture in each]


def _read_embeds(manifest: Manifest, name: str, values: object) -> _Given:
    """Embeddings [U, k, E], or a list of one such array, as diffusers has it for each adapter."""
    if isinstance(values, (list, tuple)) and len(values) == 1:
        (values,) = values
    width = manifest.components[ADAPTER].inputs[0].shape[-1]
    found = read_numbers(
        name, values, ("U", "k", width), "the image encoder's, for U sets of k pictures"
    )
    return _Given(found.shape[1], embeds=found.reshape(-1, found.shape[2]))


def _read_scales(manifest: Manifest, scale: object) -> NDArray[np.float32]:
    """The scale of each block, float32 [n], of one for all or of a list."""
    count = int(manifest.components[ADAPTER].outputs[0].shape[0])
    name = "ip_adapter_scale"
    scales = one_for_each(
        name,
        scale,
        count,
        f", and this bundle's model {count} double-stream blocks. Give one for all, or one for "
        "each.",
    )
    return np.array([check_number(name, s, -_MOST_SCALE, _MOST_SCALE) for s in scales], np.float32)


def _black(manifest: Manifest) -> _Given:
    """What diffusers shows to a side for which nothing is given."""
    assert manifest.ip_adapter is not None  # or there is no other side
    black = Image.new("RGB", (1, 1))
    return _Given(1, pixels=to_pixel_values([black], manifest.ip_adapter.pixels))


def zero_seen(transformer: Engine, pictures: int) -> dict[str, Array]:
    """What a transformer is given where nothing is seen; nothing where it takes nothing.

    A token whose value is zero adds nothing.
    """
    sizes = {"B": pictures, "V": 1}
    return {
        spec.name: np.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], np.float32)
        for spec in transformer.inputs
        if spec.name in SEEN
    }
