"""From a request's body to a call of the pipeline, and back to what the reply says of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL.Image import Image, Resampling

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.serve.images_api.bodies import EditBody, GenerationBody
from fluxdeploy.serve.images_api.errors import ApiError
from fluxdeploy.serve.images_api.settings import Settings
from fluxdeploy.serve.images_api.sizes import Sizes
from fluxdeploy.serve.images_api.uploads import Pictures

__all__ = ["Drawing", "limits_of", "model_name", "read_drawing"]

_PASSED = (
    *("seed", "guidance_scale", "negative_prompt", "true_cfg_scale", "max_sequence_length"),
    *("strength", "prompt_2", "negative_prompt_2"),
    *("prompt_embeds_scale", "pooled_prompt_embeds_scale", "ip_adapter_scale"),
    *("control_mode", "controlnet_conditioning_scale"),
    *("control_guidance_start", "control_guidance_end"),
    *("sampler", "skip", "preview_decoder"),
)
"""Fields that are arguments of the pipeline under the same names."""

_NONE = Pictures()


@dataclass(frozen=True)
class Drawing:
    """A request that was read and checked as far as the server can.

    arguments: for `AsyncFluxPipeline.stream`, but the prompt. echo: what the reply repeats.
    """

    body: GenerationBody | EditBody
    width: int
    height: int
    arguments: Mapping[str, Any]
    echo: Mapping[str, Any]
    created: int


def read_drawing(
    body: GenerationBody | EditBody,
    manifest: Manifest,
    settings: Settings,
    pictures: Pictures = _NONE,
) -> Drawing:
    """What a body asks for, with the bundle's defaults. Raises `ApiError`."""
    if body.model not in (None, served := model_name(manifest, settings)):
        raise ApiError(404, f"There is no model {body.model!r} here; there is {served!r}.", "model")
    sizes = Sizes.of(manifest)
    first = next(iter((*pictures.images, *pictures.controls)), None)
    width, height = body.width_and_height or sizes.default(manifest.defaults, first)
    sizes.check(width, height)
    if width * height * body.n > settings.max_pixels:
        raise ApiError(
            400,
            f"{body.n} x {width}x{height} are {width * height * body.n} pixels, and this server "
            f"draws {settings.max_pixels} a request. Ask for less.",
            "size",
        )
    defaults = manifest.defaults
    steps = body.num_inference_steps or defaults.num_inference_steps
    if steps > settings.max_steps:
        raise ApiError(
            400,
            f"{steps} steps are more than the {settings.max_steps} that this server makes.",
            "num_inference_steps",
        )
    arguments: dict[str, Any] = {
        name: value for name in _PASSED if (value := getattr(body, name, None)) is not None
    }
    arguments |= {"width": width, "height": height, "num_images_per_prompt": body.n}
    arguments |= {"num_inference_steps": steps, "priority": body.priority}
    arguments |= {"num_previews": body.partial_images}
    arguments |= _given(pictures, width, height, "kontext" in manifest.tasks)
    guidance = defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale
    echo = {
        "num_inference_steps": steps,
        "guidance_scale": guidance if manifest.guidance_embedding else None,
        "negative_prompt": body.negative_prompt,
        "true_cfg_scale": 1.0 if body.true_cfg_scale is None else body.true_cfg_scale,
    }
    return Drawing(body, width, height, arguments, echo, int(time.time()))


def _given(pictures: Pictures, width: int, height: int, references: bool) -> dict[str, Any]:
    """The arguments that pictures are.

    references: whether the images keep their sizes, and are several for one picture.
    """

    def resized(picture: Image) -> Image:
        # As the pipeline would: what waits for its turn is then as large as what is drawn.
        return picture.resize((width, height), Resampling.LANCZOS)

    images = pictures.images
    given: dict[str, Any] = {}
    if references and images:
        given["image"] = [list(images)]
    elif len(images) > 1:
        raise ApiError(
            400, f"There are {len(images)} images, and this model draws from one.", "image"
        )
    elif images:
        given["image"] = resized(images[0])
    if pictures.mask is not None:
        given["mask_image"] = resized(pictures.mask)
    controls = [resized(picture) for picture in pictures.controls]
    if controls:
        given["control_image"] = controls if len(controls) > 1 else controls[0]
    if pictures.redux_images:
        # What a Redux reads of them is small, whatever is drawn.
        given["redux_image"] = list(pictures.redux_images)
    return given | dict(pictures.seen)


def model_name(manifest: Manifest, settings: Settings) -> str:
    """What requests call the bundle."""
    checkpoint = manifest.provenance.get("checkpoint")
    name = checkpoint.get("name") if isinstance(checkpoint, Mapping) else None
    return settings.model or (name if isinstance(name, str) and name else "flux")


def limits_of(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """What a bundle draws, for whoever asks for the model."""
    sizes, defaults = Sizes.of(manifest), manifest.defaults
    tasks = set(manifest.tasks) if "vae_encoder" in manifest.components else set()
    joined = manifest.redux is not None or manifest.ip_adapter is not None
    masking = bool(tasks & {"inpainting", "fill"})
    noising = masking or "image to image" in tasks
    image = "image" if noising or "kontext" in tasks else None
    if image is None and tasks & {"control", "controlnet"}:
        image = "control_image"
    editing = joined or image is not None
    return {
        "width": {**asdict(sizes.widths), "default": defaults.width},
        "height": {**asdict(sizes.heights), "default": defaults.height},
        "multiple_of": sizes.multiple,
        "max_pixels": settings.max_pixels,
        "num_inference_steps": {"max": settings.max_steps, "default": defaults.num_inference_steps},
        "guidance_scale": defaults.guidance_scale if manifest.guidance_embedding else None,
        "strength": defaults.strength if noising else None,
        # What an edit is drawn from, and whether a mask goes with it.
        "image": image,
        "mask": masking,
        "tasks": [
            *(["generations"] if "text to image" in manifest.tasks else []),
            *(["edits"] if editing else []),
        ],
    }
