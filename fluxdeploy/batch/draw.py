"""Drawing jobs with a pipeline: pictures as the bytes of their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxdeploy import __version__
from fluxdeploy.batch.jobs import Job
from fluxdeploy.batch.order import TEXTS, Order
from fluxdeploy.errors import Cancelled, UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.edges import find_filter
from fluxdeploy.host.input_images import open_image, open_mask
from fluxdeploy.host.loras import describe_loras, lora_sha256
from fluxdeploy.host.outpainting import outpaint_canvas
from fluxdeploy.host.pictures import PictureMetadata, encode_picture
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.noise import standard_normal

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxdeploy.host.pipeline import FluxPipeline

__all__ = ["Drawn", "OnPreview", "check_order", "draw"]

OnPreview = Callable[["list[Image]"], None]
"""Called after each step with a small picture of where each picture of the call is going."""


_SEVERAL_NUMBERS = (
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "ip_adapter_scale",
    "prompt_embeds_scale",
    "pooled_prompt_embeds_scale",
)
_SEEN = ("ip_adapter_image", "negative_ip_adapter_image")


@dataclass(frozen=True)
class Drawn:
    """A picture: the bytes of its PNG, which says how it was made, and its share of the seconds."""

    png: bytes
    width: int
    height: int
    seconds: float


def check_order(pipe: FluxPipeline, order: Order) -> dict[Path, str]:
    """Look at all of an order that can be looked at before it is drawn.

    Returns the SHA-256 of the files that it names. Raises what a call raises.
    """
    arguments, files = _arguments(order)
    cancel = CancelToken()
    cancel.cancel()
    try:
        # A call reads all its arguments before it asks for its turn.
        pipe(order.prompt, seed=0 if order.seed is None else order.seed, cancel=cancel, **arguments)
    except Cancelled:
        return files
    raise AssertionError("a cancelled call has drawn")


def draw(
    pipe: FluxPipeline,
    jobs: Sequence[Job],
    on_step: Callable[[], None],
    on_preview: OnPreview | None = None,
) -> list[tuple[Drawn, ...]]:
    """The pictures of jobs, drawn as one call; several are of one shape, and from text alone.

    Raises what a call raises.
    """
    start = time.monotonic()
    first = jobs[0].order
    arguments, files = _arguments(first)
    if first.guidance_scale == pipe.bundle.manifest.defaults.guidance_scale:
        arguments["guidance_scale"] = None  # a bundle that has no use for it says so of others
    if len(jobs) == 1:
        arguments |= {"prompt": first.prompt, "seed": first.seed}
    else:
        arguments |= {
            "prompt": [job.order.prompt for job in jobs],
            "latents": np.concatenate([_noise(pipe, job.order) for job in jobs]),
        }
        for name in TEXTS:
            if getattr(first, name) is not None:
                arguments[name] = [getattr(job.order, name) for job in jobs]

    def on_step_end(*_: object) -> None:
        on_step()

    if on_preview is not None:
        arguments |= {
            "preview_decoder": "linear",
            "callback_on_preview": lambda pipe, steps, images: on_preview(images),
        }
    images: Any = pipe(callback_on_step_end=on_step_end, **arguments).images
    seconds = (time.monotonic() - start) / len(images)
    drawn, pictures = [], iter(images)
    for job in jobs:
        found = []
        for number, image in zip(range(len(job.paths)), pictures, strict=False):
            metadata = _metadata(job.order, number, arguments, files, pipe)
            if metadata.height is None:
                metadata = replace(metadata, height=image.height, width=image.width)
            png = encode_picture(image, metadata)
            found.append(Drawn(png, image.width, image.height, seconds))
        drawn.append(tuple(found))
    return drawn


def _arguments(order: Order) -> tuple[dict[str, Any], dict[Path, str]]:
    """The arguments of a call but for prompt and seed, and the SHA-256 of the files in it."""
    files: dict[Path, str] = {}
    image = mask = None
    opened, controls, varied = [], [], []
    for path in order.image:
        picture, files[path] = open_image(path)
        opened.append(picture)
    if opened:
        image = opened[0]
    for path in order.control_image:
        picture, files[path] = open_image(path)
        controls.append(picture if order.control is None else find_filter(order.control)(picture))
    for path in order.redux_image:
        picture, files[path] = open_image(path)
        varied.append(picture)
    if order.control is not None and not controls:
        raise UsageError("`control` filters a `control_image`: give one.")
    if order.mask_image is not None:
        mask, files[order.mask_image] = open_mask(order.mask_image)
    seen: dict[str, Image] = {}
    for name in _SEEN:
        path = getattr(order, name)
        if path is not None:
            seen[name], files[path] = open_image(path)
    files |= {lora.path: lora_sha256(lora.path) for lora in order.lora}
    width, height = order.width, order.height
    if order.outpaint is not None:
        if image is None or mask is not None or len(opened) > 1:
            raise UsageError("Outpainting needs one image, and makes the mask: leave out the mask.")
        image, mask = outpaint_canvas(image, *order.outpaint)
        width = image.width if width is None else width
        height = image.height if height is None else height
    arguments = {
        "prompt_2": order.prompt_2,
        "negative_prompt_2": order.negative_prompt_2,
        "negative_prompt": order.negative_prompt,
        "true_cfg_scale": order.true_cfg_scale,
        "height": height,
        "width": width,
        "num_inference_steps": order.num_inference_steps,
        "guidance_scale": order.guidance_scale,
        "num_images_per_prompt": order.num_images_per_prompt,
        "image": [opened] if len(opened) > 1 else image,
        "mask_image": mask,
        "strength": order.strength,
        "padding_mask_crop": order.padding_mask_crop,
        "control_image": _one_or_all(controls),
        "control_mode": _one_or_all(order.control_mode),
        "redux_image": varied or None,
        "max_area": order.max_area,
        "auto_resize": order.auto_resize is not False,
        "max_sequence_length": order.max_sequence_length,
        "sampler": order.sampler,
        "skip": order.skip,
        "lora": order.lora,
        **seen,
    }
    for name in _SEVERAL_NUMBERS:
        if getattr(order, name):
            arguments[name] = _one_or_all(getattr(order, name))
    return arguments, files


def _one_or_all(values: Sequence[Any]) -> Any:
    """What is given for all ControlNets, blocks or pictures, or for each; None for nothing."""
    return (values or [None])[0] if len(values) < 2 else list(values)


def _noise(pipe: FluxPipeline, order: Order) -> Any:
    """What a call of its own would begin with, float32 [B, L, C]."""
    spec = pipe.bundle.manifest.latents
    assert order.height is not None
    assert order.width is not None
    assert order.seed is not None
    shape = latent_shape(order.num_images_per_prompt, order.height, order.width, spec)
    return pack(standard_normal(shape, order.seed), spec)


def _metadata(
    order: Order,
    number: int,
    arguments: dict[str, Any],
    files: dict[Path, str],
    pipe: FluxPipeline,
) -> PictureMetadata:
    marked = arguments["mask_image"] is not None
    skip = order.skip if isinstance(order.skip, str) else _joined(order.skip)
    return PictureMetadata(
        prompt=order.prompt,
        prompt_2=order.prompt_2,
        negative_prompt=order.negative_prompt,
        negative_prompt_2=order.negative_prompt_2,
        true_cfg_scale=order.true_cfg_scale,
        seed=order.seed,
        index=number,
        num_inference_steps=order.num_inference_steps or 0,
        guidance_scale=order.guidance_scale or 0.0,
        sampler=None if order.sampler == "euler" else order.sampler,
        skip=None if skip == "none" else skip,
        max_sequence_length=order.max_sequence_length or 0,
        height=arguments["height"],
        width=arguments["width"],
        strength=order.strength if order.image else None,
        image_sha256=",".join(files[path] for path in order.image) or None,
        mask_sha256=_hash_of(order.mask_image, files),
        padding_mask_crop=order.padding_mask_crop if marked else None,
        outpaint=None if order.outpaint is None else _joined(order.outpaint),
        bundle_hash=pipe.bundle.content_hash,
        fluxdeploy_version=__version__,
        loras=describe_loras(order.lora, files) if order.lora else None,
        control_sha256=",".join(files[path] for path in order.control_image) or None,
        control=order.control,
        redux_sha256=",".join(files[path] for path in order.redux_image) or None,
        control_mode=_joined(order.control_mode) or None,
        max_area=order.max_area,
        auto_resize="no" if order.auto_resize is False else None,
        **{name: _joined(getattr(order, name)) or None for name in _SEVERAL_NUMBERS},
        ip_adapter_sha256=_hash_of(order.ip_adapter_image, files),
        negative_ip_adapter_sha256=_hash_of(order.negative_ip_adapter_image, files),
    )


def _hash_of(path: Path | None, files: dict[Path, str]) -> str | None:
    return None if path is None else files[path]


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(map(str, numbers))
