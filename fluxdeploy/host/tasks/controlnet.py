"""ControlNet: a picture is drawn along control pictures, which networks beside the model read.

Equal to diffusers' FluxControlNetPipeline, for a bundle that was built with ControlNets; with an
`image` to its FluxControlNetImg2ImgPipeline, with a mask too to FluxControlNetInpaintPipeline. One
generator draws the noise of the posterior of each control picture, for every picture of the
batch, and then what is drawn without ControlNets; for those that take pixels nothing is drawn. In
step i of the n that are made a ControlNet counts where start <= i/n and (i + 1)/n <= end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer, check_number
from fluxdeploy.bundle.manifest import ControlNetRecord, Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.encoding import control_latents, read_controls, start_noise
from fluxdeploy.host.tasks.image_to_image import ImageToImage
from fluxdeploy.host.tasks.inpainting import Inpainting
from fluxdeploy.host.tasks.task import ControlInput, Start, Task
from fluxdeploy.sampling.latents import latent_shape, token_grid
from fluxdeploy.sampling.noise import Generators

__all__ = ["ControlNet", "ControlNetImageToImage", "ControlNetInpainting"]

_MOST_SCALE = 1e3


@dataclass(frozen=True)
class Controlled:
    """What one ControlNet is given: pictures float32 [Bc, 3, H, W] in -1..1, and how it counts.

    There is one picture for all, one for each prompt or one for each picture. mode: the kind of
    control, None where it knows one alone.
    """

    images: NDArray[np.float32]
    mode: int | None
    scale: float
    start: float
    end: float


_OPTIONS: Mapping[str, object] = {
    "control_mode": None,
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}


class _AlongControls(Task):
    """What tasks with control pictures share, whatever they begin with."""

    given: tuple[Controlled, ...]

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """Encoders are given one picture at a time, and ControlNets what the transformer is."""
        request, manifest = self.request, self.manifest
        height, width, text = request.height, request.width, request.text_tokens
        _, _, h, w = latent_shape(1, height, width, manifest.latents)
        rows, columns = token_grid(height, width, manifest.latents)
        tokens = rows * columns
        sizes = {"vae_encoder": {"H": height, "W": width, "h": h, "w": w}}
        for record in manifest.controlnets:
            name = record.component
            sizes[name] = {"L": tokens, "S": text, "T": text + tokens}
            sizes[f"{name}_conditioner"] = {"S": text}
            if _encoder(name) in manifest.components:
                sizes[_encoder(name)] = {"H": height, "W": width, "L": tokens}
        return sizes

    def notices(self) -> tuple[str, ...]:
        """What the plain task tells, and control pictures that count in no step."""
        told = super().notices()
        if any(_scales(each, self.steps).any() for each in self.given):
            return told
        return (
            *told,
            f"`control_image` does nothing: in none of {self.steps} steps a ControlNet counts. "
            "Raise `controlnet_conditioning_scale` or `control_guidance_end`, or lower "
            "`control_guidance_start`.",
        )


@dataclass(frozen=True)
class ControlNet(_AlongControls):
    """Pictures drawn along control pictures, with one set of them for each ControlNet."""

    name: ClassVar[str] = "controlnet"
    chosen_by: ClassVar[tuple[str, ...]] = ("control_image",)
    options: ClassVar[Mapping[str, object]] = _OPTIONS
    components: ClassVar[tuple[str, ...]] = ("vae_encoder",)
    draws_more: ClassVar[bool] = True

    given: tuple[Controlled, ...]

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> ControlNet:
        """The task of a request with `control_image`, and the options of each ControlNet."""
        return cls(request, manifest, _read(request, manifest, arguments))

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """Noise of the seed, and what each ControlNet reads of its control pictures."""
        assert self.request.seed is not None
        generator = Generators(self.request.seed)
        controls = _inputs(self, self.given, generator, run)
        noise = start_noise(self.request, self.manifest.latents, generator)
        return Start(noise, sigmas, controls=controls)


@dataclass(frozen=True)
class ControlNetImageToImage(_AlongControls, ImageToImage):
    """Pictures made from pictures, along control pictures."""

    name: ClassVar[str] = "controlnet"
    chosen_by: ClassVar[tuple[str, ...]] = ("control_image", "image")
    options: ClassVar[Mapping[str, object]] = {**ImageToImage.options, **_OPTIONS}
    draws_more: ClassVar[bool] = True

    given: tuple[Controlled, ...]

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> ControlNetImageToImage:
        """The task of a request with `image` and `control_image`, and the options of both."""
        plain = ImageToImage.read(request, manifest, arguments)
        return cls(**vars(plain), given=_read(request, manifest, arguments))

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """What image to image begins with, and what each ControlNet reads."""
        assert self.request.seed is not None
        generator = Generators(self.request.seed)
        controls = _inputs(self, self.given, generator, run)
        if self.request.latents is not None:
            start = Start(self.request.latents.copy(), sigmas[-(self.steps + 1) :])
        else:
            start = self.begin(sigmas, generator, run)
        return replace(start, controls=controls)


@dataclass(frozen=True)
class ControlNetInpainting(_AlongControls, Inpainting):
    """The marked part of pictures drawn again, along control pictures of the whole."""

    name: ClassVar[str] = "controlnet"
    chosen_by: ClassVar[tuple[str, ...]] = ("control_image", "image", "mask_image")
    options: ClassVar[Mapping[str, object]] = {**Inpainting.options, **_OPTIONS}

    given: tuple[Controlled, ...]

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> ControlNetInpainting:
        """The task of a request with an image, a mask and a control image, and their options."""
        if arguments["padding_mask_crop"] is not None:
            raise UsageError(
                "`padding_mask_crop` has no place beside `control_image`, which is of the whole "
                "picture. Leave it out, or give a part of image, mask and control image."
            )
        plain = Inpainting.read(request, manifest, arguments)
        return cls(**vars(plain), given=_read(request, manifest, arguments))

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """What inpainting begins with, and what each ControlNet reads."""
        assert self.request.seed is not None  # latents are refused
        generator = Generators(self.request.seed)
        controls = _inputs(self, self.given, generator, run)
        return replace(self.begin(sigmas, generator, run), controls=controls)


def _read(
    request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
) -> tuple[Controlled, ...]:
    """What each ControlNet is given. Raises `UsageError` for a value that cannot be."""
    count = len(manifest.controlnets)
    images = arguments["control_image"]
    if count > 1 and (not isinstance(images, (list, tuple)) or len(images) != count):
        raise UsageError(
            f"This bundle has {count} ControlNets. Give `control_image` as a list with what "
            "each of them takes, in the order in which it was built with them."
        )
    sets = images if count > 1 else [images]
    modes = _modes(arguments, manifest.controlnets)
    scales = _each("controlnet_conditioning_scale", arguments, count)
    starts = _each("control_guidance_start", arguments, count)
    ends = _each("control_guidance_end", arguments, count)
    return tuple(
        Controlled(
            read_controls(sets[i], request),
            _mode(modes[i], record),
            check_number("controlnet_conditioning_scale", scales[i], -_MOST_SCALE, _MOST_SCALE),
            check_number("control_guidance_start", starts[i], 0, 1),
            check_number("control_guidance_end", ends[i], 0, 1),
        )
        for i, record in enumerate(manifest.controlnets)
    )


def _inputs(
    task: Task, given: Sequence[Controlled], generator: Generators, run: Run
) -> tuple[ControlInput, ...]:
    """What each ControlNet reads of its control pictures; the generator draws their noise."""
    controls = []
    batch, spec = task.request.batch, task.manifest.latents
    for record, each in zip(task.manifest.controlnets, given, strict=True):
        if _encoder(record.component) in task.manifest.components:
            tokens = _from_pixels(record.component, each.images, run)
            latents = np.repeat(tokens, batch // len(each.images), axis=0)
        else:
            latents = control_latents(each.images, batch, spec, generator, run)
        controls.append(
            ControlInput(record.component, latents, each.mode, _scales(each, task.steps))
        )
    return tuple(controls)


def _scales(given: Controlled, steps: int) -> NDArray[np.float32]:
    """What residuals are multiplied with in each step, float32 [N]."""
    inside = [
        given.start <= step / steps and (step + 1) / steps <= given.end for step in range(steps)
    ]
    return np.where(inside, np.float32(given.scale), np.float32(0))


def _encoder(component: str) -> str:
    """The component that makes tokens of pixels, where a ControlNet has one."""
    return f"{component}_encoder"


def _from_pixels(component: str, images: NDArray[np.float32], run: Run) -> NDArray[np.float32]:
    found = [run(_encoder(component), {"images": image[None]}) for image in images]
    return np.concatenate([each["control_latents"] for each in found])


def _each(name: str, arguments: Mapping[str, Any], count: int) -> Sequence[Any]:
    """What is given for each of several ControlNets: one for all, or a list."""
    value = arguments[name]
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise UsageError(
            f"`{name}` has {len(value)} entries, and this bundle {count} ControlNets. Give one for "
            "all, or one for each."
        )
    return value


def _modes(arguments: Mapping[str, Any], records: Sequence[ControlNetRecord]) -> Sequence[Any]:
    """The mode for each ControlNet: one for all is for those that have modes."""
    modes = _each("control_mode", arguments, len(records))
    if isinstance(arguments["control_mode"], (list, tuple)):
        return modes
    some = any(record.modes for record in records)
    return [
        None if some and not record.modes else mode
        for mode, record in zip(modes, records, strict=True)
    ]


def _mode(value: object, record: ControlNetRecord) -> int | None:
    """The kind of control, where a ControlNet tells several apart."""
    if record.modes == 0:
        if value is None:
            return None
        raise UsageError(
            f"`control_mode` has no place here: {record.component} knows one kind of control. "
            "Leave it out."
        )
    if value is None:
        raise UsageError(
            f"{record.component} tells {record.modes} kinds of control apart. Give `control_mode`, "
            f"0 to {record.modes - 1}; its model card says which is which."
        )
    return check_integer("control_mode", value, 0, record.modes - 1)
