"""How a call of `FluxPipeline` goes, whatever it draws, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_flag, check_integer, shown
from fluxdeploy.errors import UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pictures import to_pil
from fluxdeploy.host.tasks.task import Task
from fluxdeploy.host.turns import Priority, check_priority

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CallOptions", "FluxPipelineOutput", "replaced_latents"]

_MAX_PREVIEWS = 100


@dataclass(frozen=True)
class FluxPipelineOutput:
    """What a call made.

    images: a list of `PIL.Image.Image`, or float32 [B, H, W, 3] in 0..1 with output_type="np", or
        latents, float32 [B, L, C], packed, with "latent".
    seed: the seed, or the list of them, that makes these pictures again; None where the caller gave
        the latents.
    notices: of arguments that did nothing, prompts that were cut and pictures that were made in
        tiles, a sentence each.
    seconds: how long it was "queued", and how long its "encoding", "denoising" and "decoding" ran.
    """

    images: list[Image] | NDArray[np.float32]
    seed: int | tuple[int, ...] | None
    seconds: Mapping[str, float]
    notices: tuple[str, ...] = ()

    def __getitem__(self, key: object) -> list[Image] | NDArray[np.float32]:
        """The images, under 0 and "images", as in diffusers."""
        if key == "images" or key == 0:
            return self.images
        raise (KeyError if isinstance(key, str) else IndexError)(key)


@dataclass(frozen=True)
class CallOptions:
    """How a call goes, whatever it draws: the arguments of `FluxPipeline.__call__` for that."""

    callback_on_step_end: Callable[..., object] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    num_previews: int = 0
    callback_on_preview: Callable[..., object] | None = None
    preview_decoder: Literal["vae", "linear"] = "vae"
    cancel: CancelToken | None = None
    priority: Priority = "normal"
    output_type: Literal["pil", "np", "latent"] = "pil"
    return_dict: bool = True

    def check(self) -> None:
        """Raise `UsageError` for what cannot be, and for previews that nobody takes."""
        if not isinstance(self.output_type, str) or self.output_type not in _OUTPUT_TYPES:
            raise UsageError(
                f"The output_type {shown(self.output_type)} is unknown. Use 'pil', 'np' or "
                "'latent'; arrays of NumPy become tensors by `torch.from_numpy`."
            )
        check_flag("return_dict", self.return_dict)
        if not isinstance(self.cancel, (CancelToken, type(None))):
            raise UsageError(f"`cancel` must be a CancelToken, not {type(self.cancel).__name__}.")
        check_priority(self.priority)
        for name in ("callback_on_step_end", "callback_on_preview"):
            callback = getattr(self, name)
            if callback is not None and not callable(callback):
                raise UsageError(f"`{name}` is {shown(callback)}, which cannot be called.")
        _check_tensor_inputs(self.callback_on_step_end_tensor_inputs)
        if (
            check_integer("num_previews", self.num_previews, 0, _MAX_PREVIEWS)
            and not self.callback_on_preview
        ):
            raise UsageError("`num_previews` needs a `callback_on_preview` that takes them.")
        self._check_preview_decoder()

    def _check_preview_decoder(self) -> None:
        decoder = self.preview_decoder
        if not isinstance(decoder, str) or decoder not in ("vae", "linear"):
            raise UsageError(f"`preview_decoder` is {shown(decoder)}. Use 'vae' or 'linear'.")
        if decoder == "linear" and not self.callback_on_preview:
            raise UsageError("`preview_decoder` needs a `callback_on_preview` that takes previews.")
        if decoder == "linear" and self.num_previews:
            raise UsageError(
                "`num_previews` has no say where `preview_decoder` is 'linear': there is one of "
                "each step. Leave it out."
            )

    def finished(self, task: Task, made: NDArray[np.float32]) -> list[Image] | NDArray[np.float32]:
        """What was made, pictures [B, H, W, 3] in 0..1 or latents, as the call shall give it."""
        if self.output_type == "latent":
            return made
        pictures = map(task.finish, made)
        return np.stack(list(pictures)) if self.output_type == "np" else to_pil(pictures)


_OUTPUT_TYPES = ("pil", "np", "latent")


def _check_tensor_inputs(names: object) -> None:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            "`callback_on_step_end_tensor_inputs` must be a list of names, such as ['latents'], "
            f"not {shown(names)}."
        )
    for name in names:
        if name != "latents":
            raise UsageError(
                f"`callback_on_step_end_tensor_inputs` has {shown(name)}; a callback is given "
                f"'latents' alone.{_ABOUT_TEXT * (name == 'prompt_embeds')}"
            )


def replaced_latents(answer: object) -> NDArray[np.float32] | None:
    """The latents of what a step's callback has returned, or None. Raises `UsageError`."""
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise UsageError(
            f"callback_on_step_end returned a {type(answer).__name__}. It must return None or a "
            'dictionary such as {"latents": latents}.'
        )
    unknown = [key for key in answer if key != "latents"]
    if unknown:
        raise UsageError(
            f"callback_on_step_end returned {', '.join(map(shown, unknown))}. Only 'latents' can "
            f"be replaced; leave the others out.{_ABOUT_TEXT * ('prompt_embeds' in unknown)}"
        )
    # The loop looks at what it is.
    latents: NDArray[np.float32] | None = answer.get("latents")
    return latents


_ABOUT_TEXT = " The text of all steps is read before the first: give `prompt_embeds` to the call."
