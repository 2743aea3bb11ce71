"""What programs for diffusers ask a pipeline for and is not here: a sentence for each.

docs/diffusers.md has the table of all arguments, which a test holds against diffusers' signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError

__all__ = ["ARGUMENTS", "ATTRIBUTES", "missing_attribute", "refuse_arguments"]

ARGUMENTS: Mapping[str, str] = {
    "generator": (
        "it is `seed=` here: an integer, or a list with one for each picture, as "
        '`torch.Generator("cpu").manual_seed(seed)` has it'
    ),
    "joint_attention_kwargs": (
        "the attention is part of a built engine, and a LoRA's scale of `lora=`; leave it out"
    ),
    "masked_image_latents": "they are made of `image` and `mask_image`; give these",
    "callback": "it is `callback_on_step_end=` here",
    "callback_steps": "`callback_on_step_end` is called after every step",
    "clip_skip": "FLUX.1 reads CLIP's last layer; leave it out",
    "_auto_resize": "it is `auto_resize=` here",
    "cross_attention_kwargs": "the attention is part of a built engine; leave it out",
    "eta": "FLUX.1's samplers draw no noise; leave it out",
    "timesteps": "the schedule is the bundle's; choose `num_inference_steps`",
}
"""Arguments of diffusers' pipelines that `FluxPipeline.__call__` has not, and what there is."""

_PARTS = "the parts of a bundle are built engines; `pipe.bundle.manifest` describes them"
_PLACE = (
    "engines run where they were built for; `from_bundle` takes `runtime=` and "
    "`EngineOptions(device=...)`"
)
_MEMORY = "for less memory open the bundle with `from_bundle(..., low_vram=True)`"
_TILES = "the VAE goes in tiles by itself where memory does not hold a whole picture; leave it out"
_LORA = (
    "give `lora=` to the calls of a bundle that was built with `--lora-rank`, or merge it with "
    "`fluxdeploy build --lora` or `refit`"
)
_ADAPTER = "an IP-Adapter is part of a bundle that was built with `--ip-adapter`"
_SAVED = "a bundle is a folder; copy it"

ATTRIBUTES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("vae", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
            *("components", "config", "image_processor", "mask_processor"),
        ),
        _PARTS,
    ),
    "scheduler": "the schedule is in `pipe.bundle.manifest.schedule`, as the checkpoint has it",
    **dict.fromkeys(("to", "cuda", "cpu", "device", "dtype", "half", "float"), _PLACE),
    **dict.fromkeys(
        (
            *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
            *("maybe_free_model_hooks", "remove_all_hooks", "reset_device_map"),
        ),
        _MEMORY,
    ),
    **dict.fromkeys(
        (
            *("enable_vae_slicing", "disable_vae_slicing", "enable_vae_tiling"),
            "disable_vae_tiling",
        ),
        _TILES,
    ),
    **dict.fromkeys(
        (
            *("enable_attention_slicing", "disable_attention_slicing"),
            *("enable_xformers_memory_efficient_attention", "fuse_qkv_projections"),
            *("disable_xformers_memory_efficient_attention", "unfuse_qkv_projections"),
        ),
        "the attention is part of a built engine; leave it out",
    ),
    **dict.fromkeys(
        (
            *("load_lora_weights", "unload_lora_weights", "set_adapters", "get_active_adapters"),
            *("fuse_lora", "unfuse_lora", "delete_adapters", "get_list_adapters"),
        ),
        _LORA,
    ),
    "load_textual_inversion": "weights are part of a bundle; leave it out",
    **dict.fromkeys(("load_ip_adapter", "unload_ip_adapter"), _ADAPTER),
    "set_ip_adapter_scale": "give `ip_adapter_scale=` to the calls",
    **dict.fromkeys(("save_pretrained", "push_to_hub"), _SAVED),
    "from_pipe": "one pipeline does all: give a call `image=` or `mask_image=`",
    "encode_prompt": "give the prompts to the call; it keeps what was encoded",
    "progress_bar": "show the steps with `pipe.set_progress_bar_config()`",
    "numpy_to_pil": "a call gives PIL images, with output_type='pil'",
    **dict.fromkeys(
        ("num_timesteps", "current_timestep"), "a `callback_on_step_end` is told of each step"
    ),
    "guidance_scale": "`guidance_scale` is an argument of each call",
    "joint_attention_kwargs": ARGUMENTS["joint_attention_kwargs"],
    "safety_checker": "nothing is checked but what is drawn for NaN; leave it out",
}
"""What diffusers' pipelines have and `FluxPipeline` has not, and what there is."""


def refuse_arguments(positional: Sequence[object], others: Mapping[str, object]) -> None:
    """Raise `UsageError` where a call has arguments that nothing takes."""
    if positional:
        raise UsageError(
            f"{shown(positional[0])} comes after `true_cfg_scale`: give it by its name. The order "
            "is another one in each of diffusers' pipelines."
        )
    for name in others:
        if name in ARGUMENTS:
            raise UsageError(f"There is no `{name}`: {ARGUMENTS[name]}.")
        raise UsageError(
            f"There is no argument {shown(name)}. `help(FluxPipeline.__call__)` lists them."
        )


def missing_attribute(name: str) -> str:
    """What to say of an attribute that a pipeline has not."""
    if name in ATTRIBUTES:
        return f"A fluxdeploy FluxPipeline has no `{name}`: {ATTRIBUTES[name]}."
    return f"'FluxPipeline' object has no attribute '{name}'"
