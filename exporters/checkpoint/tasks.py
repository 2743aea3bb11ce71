"""What a checkpoint was trained for, by the channels that its transformer reads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fluxdeploy.bundle.manifest import Defaults, LatentSpec
from fluxdeploy.errors import CheckpointError

__all__ = ["PIPELINES", "TASKS", "find_task", "usual_defaults"]

PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "FluxPipeline": "text to image",
        "FluxImg2ImgPipeline": "text to image",
        "FluxInpaintPipeline": "text to image",
        "FluxFillPipeline": "fill",
        "FluxControlPipeline": "control",
        "FluxControlImg2ImgPipeline": "control",
        "FluxControlInpaintPipeline": "control",
        "FluxKontextPipeline": "kontext",
        "FluxKontextInpaintPipeline": "kontext",
    }
)
"""diffusers' pipelines, as model_index.json names them, and what their checkpoints are made for."""

TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text to image": ("text to image", "image to image", "inpainting"),
        "fill": ("fill",),
        "control": ("control",),
        "kontext": ("text to image", "kontext"),
    }
)
"""What a bundle of a checkpoint does, by what it was trained for."""


def find_task(
    pipeline: str | None, read: int, given: int, latents: LatentSpec, asked: str | None = None
) -> str:
    """What a checkpoint was trained for, one of `TASKS`.

    read, given: the channels of a token that the transformer takes and gives. These decide, and
    model_index.json between tasks that read the same: `pipeline` is the class that it names, None
    without one; `asked` is what a user says of a checkpoint that does not tell, None for nothing.
    Raises `CheckpointError` where these contradict each other, and for a transformer that reads
    what no task of FLUX.1 gives it.
    """
    channels = {task: latents.channels_read(task) for task in TASKS}
    fitting = [task for task, count in channels.items() if count == read]
    if given != latents.token_channels or not fitting:
        known = ", ".join(f"{count} for {task}" for task, count in channels.items())
        raise CheckpointError(
            f"The transformer takes {read} channels and gives {given}, where the VAE's latents "
            f"make {latents.token_channels}. FLUX.1's take {known}: the parts belong to different "
            "checkpoints, or to another model family."
        )
    said = fitting[0] if pipeline is None else PIPELINES[pipeline]
    # A plain FluxPipeline is what many tools write, whatever the transformer.
    if said not in fitting and said != "text to image":
        raise CheckpointError(
            f"model_index.json says {pipeline}, whose transformer reads {channels[said]} channels, "
            f"and this one reads {read}, as for {fitting[0]}: the parts belong to different "
            "checkpoints."
        )
    if asked is None:
        return said if said in fitting else fitting[0]
    if asked not in fitting:
        raise CheckpointError(
            f"--task {asked} was said, whose transformer reads {channels[asked]} channels, and "
            f"this one reads {read}, as for {fitting[0]}: leave out --task."
        )
    return asked


def usual_defaults(task: str, guided: bool) -> Defaults:
    """What a host uses for a checkpoint whose author recorded nothing: the model cards' values.

    guided: whether it has a guidance embedding. Canny's card says a guidance of 30 and Depth's one
    of 10; their tensors do not tell which is which.
    """
    guidance = {"fill": 30.0, "control": 10.0, "kontext": 2.5}.get(task, 3.5)
    steps = {"fill": 50, "control": 30}.get(task, 28)
    return Defaults(
        height=1024,
        width=1024,
        num_inference_steps=steps if guided else 4,
        guidance_scale=guidance if guided else 0.0,
        max_sequence_length=512 if guided else 256,
        strength=1.0 if task == "fill" else 0.6,
    )
