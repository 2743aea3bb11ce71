"""The tensors of the model `flux`: what a request may hold, and what a response does.

One table for the model's configuration, for the model, and for its clients.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INPUTS", "MODEL", "OUTPUTS", "STAGES", "Field"]

MODEL = "flux"
"""The model that makes pictures."""

STAGES = ("queued", "encoding", "denoising", "decoding")
"""The order of the output `seconds`."""


@dataclass(frozen=True)
class Field:
    """A tensor of `flux`.

    dtype: as Triton's configurations call it, without `TYPE_`. dims: -1 is any size.
    argument: what `FluxPipeline.__call__` calls it, where it is an argument of that.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str
    argument: str | None = None


def _argument(
    name: str, dtype: str, dims: tuple[int, ...], meaning: str, argument: str | None = None
) -> Field:
    return Field(name, dtype, dims, meaning, name if argument is None else argument)


# Numbers with a fraction are FP64: 0.7 of 10 steps are 7, and of a float32 they would be 6.
INPUTS: tuple[Field, ...] = (
    _argument("prompt", "STRING", (-1,), "one, or several; the only field that must be there"),
    _argument("prompt_2", "STRING", (-1,), "what T5 reads instead: one for all, or one a prompt"),
    _argument("negative_prompt", "STRING", (-1,), "what to steer away from: one, or one a prompt"),
    _argument("negative_prompt_2", "STRING", (-1,), "what T5 reads of it instead"),
    _argument("true_cfg_scale", "FP64", (1,), "strength of the negative prompt"),
    _argument("height", "INT32", (1,), "pixels"),
    _argument("width", "INT32", (1,), "pixels"),
    _argument("num_inference_steps", "INT32", (1,), "steps"),
    _argument("guidance_scale", "FP64", (1,), "of models with a guidance embedding"),
    _argument("n", "INT32", (1,), "pictures of each prompt", "num_images_per_prompt"),
    _argument("seed", "UINT64", (-1,), "one for all pictures, or one for each"),
    _argument("latents", "FP32", (-1, -1, -1), "packed noise to start from, in place of a seed"),
    _argument("image", "UINT8", (-1, -1, 3), "a picture to start from, [H, W, 3]"),
    Field("image_bytes", "STRING", (1,), "the same as the bytes of its file, or these in base64"),
    _argument("mask_image", "UINT8", (-1, -1), "what to draw anew is white, [H, W]"),
    Field("mask_image_bytes", "STRING", (1,), "the same as the bytes of its file, or in base64"),
    _argument("strength", "FP64", (1,), "how much of the image becomes noise, 0 to 1"),
    _argument(
        "padding_mask_crop", "INT32", (1,), "pixels kept around the mask's part, drawn alone"
    ),
    _argument("control_image", "UINT8", (-1, -1, 3), "edges or depths to draw along, [H, W, 3]"),
    Field(
        "control_image_bytes",
        "STRING",
        (-1,),
        "the same as the bytes of its file, or in base64; one for each ControlNet",
    ),
    _argument(
        "control_mode", "INT32", (-1,), "kind of control: for all ControlNets, or each; -1 for none"
    ),
    _argument(
        "controlnet_conditioning_scale", "FP64", (-1,), "how much a ControlNet counts: all, or each"
    ),
    _argument(
        "control_guidance_start", "FP64", (-1,), "part of the steps before a ControlNet counts"
    ),
    _argument(
        "control_guidance_end", "FP64", (-1,), "part of the steps after which it counts no more"
    ),
    _argument("redux_image", "UINT8", (-1, -1, 3), "a picture to draw variations of, [H, W, 3]"),
    Field("redux_image_bytes", "STRING", (1,), "the same as the bytes of its file, or in base64"),
    _argument("prompt_embeds_scale", "FP64", (1,), "how much prompt and redux_image count"),
    _argument(
        "pooled_prompt_embeds_scale", "FP64", (1,), "how much CLIP's embedding of the prompt does"
    ),
    _argument("ip_adapter_image", "UINT8", (-1, -1, 3), "a picture to look like, [H, W, 3]"),
    Field("ip_adapter_image_bytes", "STRING", (1,), "the same as the bytes of its file, or base64"),
    _argument(
        "negative_ip_adapter_image", "UINT8", (-1, -1, 3), "one to steer away from, [H, W, 3]"
    ),
    Field("negative_ip_adapter_image_bytes", "STRING", (1,), "the same as the bytes of its file"),
    _argument("ip_adapter_scale", "FP64", (1,), "how much ip_adapter_image counts"),
    _argument("max_area", "INT32", (1,), "Kontext: pixels of a picture, whatever size is asked"),
    _argument("auto_resize", "BOOL", (1,), "Kontext: whether the image gets a size of training"),
    _argument("max_sequence_length", "INT32", (1,), "T5 tokens of a prompt"),
    _argument("sampler", "STRING", (1,), "how steps use the velocity; `euler` by default"),
    _argument("skip", "STRING", (1,), "`auto`: leaves out the evaluations that `tune` found"),
    _argument("num_previews", "INT32", (1,), "pictures on the way, each a response of its own"),
    _argument("preview_decoder", "STRING", (1,), "`linear`: a small one after each step instead"),
    _argument("priority", "STRING", (1,), "`high`, `normal` or `low`"),
    Field("step_events", "BOOL", (1,), "whether each step is a response of its own"),
    Field(
        "response_format",
        "STRING",
        (1,),
        "`tensor` or `b64_json`: leaves out the other output, for clients that name none",
    ),
)

OUTPUTS: tuple[Field, ...] = (
    Field("image", "UINT8", (-1, -1, -1, 3), "pictures, [n, H, W, 3]"),
    Field("b64_json", "STRING", (-1,), "the same as PNG files in base64"),
    Field("seeds", "UINT64", (-1,), "the seed of each picture; absent where nothing was drawn"),
    Field("event", "STRING", (1,), "`step`, `preview` or `final`"),
    Field("step", "INT32", (1,), "steps made so far"),
    Field("sigma", "FP64", (1,), "noise level at which the step began; of `step` alone"),
    Field("seconds", "FP64", (4,), f"{', '.join(STAGES)}; of `final` alone"),
)
