"""From a prompt to pictures: `FluxPipeline` runs a bundle's engines on NumPy arrays."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engines import choose_edition, open_engine, runtimes
from engines.base import Engine, EngineOptions
from fluxdeploy.arguments import check_flag, check_integer, check_path, shown
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import Manifest, missing_component
from fluxdeploy.errors import (
    BundleError,
    CutPromptWarning,
    TiledWarning,
    UnmeasuredSkipsWarning,
    UnusedArgumentWarning,
    UsageError,
)
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.components import Components
from fluxdeploy.host.course import unmeasured
from fluxdeploy.host.demand import demand
from fluxdeploy.host.diffusers_names import ATTRIBUTES, missing_attribute, refuse_arguments
from fluxdeploy.host.examples import (
    example_arguments,
    example_control,
    example_seen,
    example_variation,
)
from fluxdeploy.host.ip_adapter import read_adapter
from fluxdeploy.host.loras import Loras, check_loras
from fluxdeploy.host.making import LevelCallback, make_pictures
from fluxdeploy.host.memory import check_memory
from fluxdeploy.host.options import CallOptions, FluxPipelineOutput, replaced_latents
from fluxdeploy.host.previews import Wanted, require_linear
from fluxdeploy.host.prompts import PromptEncoder
from fluxdeploy.host.request import GenerationRequest, check_request, idle_arguments
from fluxdeploy.host.stats import PipelineStats
from fluxdeploy.host.tasks.control import Control
from fluxdeploy.host.tasks.controlnet import (
    ControlNet,
    ControlNetImageToImage,
    ControlNetInpainting,
)
from fluxdeploy.host.tasks.fill import Fill
from fluxdeploy.host.tasks.image_to_image import ImageToImage
from fluxdeploy.host.tasks.inpainting import Inpainting
from fluxdeploy.host.tasks.kontext import Kontext
from fluxdeploy.host.tasks.task import Task, choose_task
from fluxdeploy.host.tasks.text_to_image import TextToImage
from fluxdeploy.host.turns import Priority, QueueLimits, Turns
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.examples import example_picture
from fluxdeploy.sampling.skipping import Skips
from fluxdeploy.text import Tokenizers, load_tokenizers

__all__ = ["FluxPipeline", "FluxPipelineOutput", "PipelineCallback", "PreviewCallback"]

PipelineCallback = Callable[
    ["FluxPipeline", int, float, dict[str, Any]], "Mapping[str, Any] | None"
]
"""`callback_on_step_end(pipe, step, timestep, callback_kwargs)`, as in diffusers.

`timestep` is 1000 times the step's noise level. `callback_kwargs["latents"]` is the live array,
float32 [B, L, C], packed: copy it to keep it. A returned `{"latents": x}` replaces it.
"""

PreviewCallback = Callable[["FluxPipeline", int, Any], None]
"""`callback_on_preview(pipe, steps, images)`: what the call would end with, after so many steps.

The images are of the call's `output_type`.
"""

LoraArgument = (
    str
    | os.PathLike[str]
    | tuple[str | os.PathLike[str], float]
    | Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | LoraFile]
    | None
)
"""`lora` of a call: a file, with a scale or without, or several."""

TASKS: tuple[type[Task], ...] = (
    *(TextToImage, ImageToImage, Inpainting, Fill, Control, Kontext),
    *(ControlNet, ControlNetImageToImage, ControlNetInpainting),
)
"""The tasks that a call's arguments can ask for, where a bundle does them."""

_KEPT_TEXT = 128 << 20
"""Bytes of encoded prompts that a pipeline keeps: 16 of FLUX.1's, at 512 tokens."""


class FluxPipeline:
    """Makes pictures from a bundle. A context manager; `close` frees the engines.

    Engines are opened by the first call and kept, and so are the latest encoded prompts. Calls from
    several threads take turns: between two steps, a call of a higher priority goes first, and among
    equals a smaller one goes before a larger one. With `low_vram` an engine is open only while it
    is needed: what the task needs beyond the prompt, such as the VAE encoder, then text encoders
    and conditioner, then the transformer, then the decoder. Memory then holds the largest of them
    instead of all, every call reads the engines again, but for the text encoders where it knows the
    prompts, and each call ends before the next one begins.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizers: Tokenizers,
        open_component: Callable[[str], Engine],
        low_vram: bool = False,
        kept_text_bytes: int = _KEPT_TEXT,
        limits: QueueLimits | None = None,
    ) -> None:
        """Use `from_bundle`, unless the components shall run on something else than engines.

        Of the prompts' encoded texts, the latest `kept_text_bytes` are kept for later calls. Raises
        `UsageError` for arguments that cannot be these.
        """
        if not isinstance(getattr(bundle, "manifest", None), Manifest) or not callable(
            open_component
        ):
            raise UsageError(
                f"A pipeline cannot be made of {shown(bundle)}. Open the folder of a bundle with "
                "`FluxPipeline.from_bundle`."
            )
        low_vram = check_flag("low_vram", low_vram)
        kept_text_bytes = check_integer("kept_text_bytes", kept_text_bytes, 0)
        self._bundle = bundle
        self._components = Components(bundle.manifest, open_component, low_vram)
        self._encoder = PromptEncoder(tokenizers, bundle.manifest.tokenizers, kept_text_bytes)
        self._loras = Loras(bundle.manifest)
        # A callback may make another picture, or close the pipeline before it raises.
        self._turns = Turns(_check_limits(limits), changing=not low_vram)
        self._told: set[str] = set()
        self._bar: tuple[bool | None, str] = True, ""
        self._is_interrupted, self._interrupts = False, 0
        # Of calls that have their turn, one at a time.
        self._pictures = 0

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "auto",
        options: EngineOptions | None = None,
        low_vram: bool = False,
        limits: QueueLimits | None = None,
    ) -> FluxPipeline:
        """Open the bundle in the folder `path`, to be run by `runtime`.

        Of a bundle for several runtimes `auto` takes the edition of the best one that runs here.
        limits: what it takes on at once; everything where None.

        Raises `BundleError` where the folder is no bundle that this version reads. What is opened
        later is of this bundle: a call that would have to open an engine of another one, which has
        taken its place, raises `BundleError`. Engines that are open go on. Raises `EngineError`
        where the bundle has several editions and none that runs here, or none for the runtime, and
        `UsageError` for an argument that cannot be.
        """
        folder = check_path("path", path)
        runtimes(runtime)
        if not isinstance(options, (EngineOptions, type(None))):
            raise UsageError(f"`options` must be EngineOptions, not {shown(options)}.")
        low_vram = check_flag("low_vram", low_vram)
        bundle = choose_edition(open_bundle(folder), runtime)
        missing = missing_component(bundle.manifest)
        if missing is not None:
            raise BundleError(
                f"The bundle {bundle.root} has no {missing}, which every picture takes. Build the "
                "bundle again with `fluxdeploy build`."
            )
        open_component = functools.partial(open_engine, bundle, runtime=runtime, options=options)
        return cls(bundle, load_tokenizers(bundle), open_component, low_vram, limits=limits)

    @property
    def bundle(self) -> Bundle:
        """The bundle that the pictures come from."""
        return self._bundle

    @property
    def stats(self) -> PipelineStats:
        """What it has done since it was made, and what it has before it."""
        return PipelineStats(
            pictures=self._pictures,
            steps=self._turns.steps,
            prompt_hits=self._encoder.hits,
            prompt_misses=self._encoder.misses,
            waiting=self._turns.waiting,
            running=self._turns.running,
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        *positional: NoReturn,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: ArrayLike | None = None,
        prompt_embeds: ArrayLike | None = None,
        pooled_prompt_embeds: ArrayLike | None = None,
        negative_prompt_embeds: ArrayLike | None = None,
        negative_pooled_prompt_embeds: ArrayLike | None = None,
        redux_image: object | None = None,
        prompt_embeds_scale: float | Sequence[float] = 1.0,
        pooled_prompt_embeds_scale: float | Sequence[float] = 1.0,
        image: object | None = None,
        mask_image: object | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        control_image: object | None = None,
        control_mode: int | Sequence[int | None] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        ip_adapter_image: object | None = None,
        ip_adapter_image_embeds: object | None = None,
        negative_ip_adapter_image: object | None = None,
        negative_ip_adapter_image_embeds: object | None = None,
        ip_adapter_scale: float | Sequence[float] = 1.0,
        max_area: int | None = None,
        auto_resize: bool = True,
        max_sequence_length: int | None = None,
        sampler: str = "euler",
        sigmas: ArrayLike | None = None,
        skip: Literal["none", "auto"] | Sequence[int] | Skips = "none",
        lora: LoraArgument = None,
        callback_on_step_end: PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_previews: int = 0,
        callback_on_preview: PreviewCallback | None = None,
        preview_decoder: Literal["vae", "linear"] = "vae",
        cancel: CancelToken | None = None,
        priority: Priority = "normal",
        output_type: Literal["pil", "np", "latent"] = "pil",
        return_dict: bool = True,
        **others: NoReturn,
    ) -> FluxPipelineOutput:
        """Make `num_images_per_prompt` pictures of each prompt: p0, p0, p1, p1.

        What an engine does not take at once is computed in parts. They begin with the noise of one
        batch, and a step is one of all parts: for the callback and for what `cancel` says.

        prompt: one, or a list of them. height, width: pixels. height, width, num_inference_steps
            and guidance_scale: the bundle's defaults where None.
        prompt_2: what T5 reads instead of `prompt`, which is then CLIP's alone: one for all or one
            a prompt; `prompt` where None or empty.
        negative_prompt: what to steer away from, one for all or one a prompt; used where
            true_cfg_scale > 1, and doubles the work. negative_prompt_2: as `prompt_2`.
        guidance_scale: ignored by bundles without a guidance embedding (FLUX.1-schnell).
        seed: 0 to 2^64 - 1; the picture equals diffusers' with a CPU generator of that seed. A list
            has one for each picture, as diffusers takes generators: then each has noise of its own.
            One is drawn where None.
        latents: the noise to start from, float32 [B, L, C], packed as in diffusers. The seed then
            counts where the VAE's posterior is drawn too: in fill, in control and with ControlNets.
        prompt_embeds, pooled_prompt_embeds: in place of prompts, what T5 and CLIP make of P of
            them: float32 [P, S, E] and [P, E']. negative_prompt_embeds,
            negative_pooled_prompt_embeds: in place of negative prompts, of P or of one for all.
        redux_image: what to draw variations of, for a bundle that was built with a Redux: pictures
            of the kinds of `image`, all of them for every prompt. They stand behind the prompt's
            words, and may stand for a prompt.
        prompt_embeds_scale: what prompt and picture count, one number for all or one a picture. For
            each picture the prompt is read once more: with several, weights that sum to 1 keep its
            share. pooled_prompt_embeds_scale: the same of what CLIP reads of the prompt.
        image: what to start from instead, resized to height x width: a PIL image, an array
            [H, W, 3] or [B, H, W, 3] of uint8 or of floats in 0..1, or a list of these.
        strength: how much of the image becomes noise, 0 to 1: that share of the steps is made. The
            bundle's default where None.
        mask_image: what of the image to redraw, where it is white; the rest stays as it was. A mask
            that is not wholly opaque is read as OpenAI's: what is transparent is redrawn. A PIL
            image, an array [H, W] or [B, H, W] of bool, uint8 or of floats in 0..1, or a list of
            these; resized like the image.
        padding_mask_crop: draw only the part of the image around the mask, with so many pixels more
            on each side, in height x width, and lay it over the image, whose size the pictures have
            then. Image and mask are one PIL image each, of one size.
        control_image: what to draw along, for a bundle of a Canny or Depth checkpoint: the edges or
            depths of a picture, of the kinds and resized as `image`. Of a bundle that was built
            with ControlNets: what its ControlNet takes; of one with several, a list with what each
            takes, and what follows may be lists too; `image` and `mask_image` may stand beside it.
        control_mode: the kind of control, for a ControlNet that tells several apart.
        controlnet_conditioning_scale: what its residuals are multiplied with.
        control_guidance_start, control_guidance_end: the part of the steps, 0 to 1, in which it
            counts.
        ip_adapter_image: what the picture is to look like, for a bundle that was built with an
            IP-Adapter: of the kinds of `image` and of any size; one for all, one a prompt or one a
            picture. A list of lists has several that are seen together. ip_adapter_image_embeds: in
            its place what the image encoder makes, float32 [U, k, E] of U sets of k pictures.
            negative_ip_adapter_image, negative_ip_adapter_image_embeds: the same beside negative
            prompts; the side that is given nothing sees a black picture, as in diffusers.
        ip_adapter_scale: how much it counts, one number or one for each double-stream block.
        For a bundle of a Kontext checkpoint, `image` is what to change by words, resized to one of
            the sizes that FLUX.1 Kontext was trained with; with auto_resize=False to whole tokens
            alone. A list of lists has several for each picture. The picture has its size where
            neither height nor width is given. max_area: draw so many pixels in the proportions of
            height and width, as diffusers does.
        max_sequence_length: the number of T5 tokens that a prompt is padded or cut to.
        sampler: how steps use the velocity: "euler", as diffusers; "ab2" and "dpmpp_2m", as many
            evaluations and of second order; "heun" and "midpoint" with twice as many, "rk4" of
            fourth order with four times as many.
        sigmas: the noise levels of the steps before shifting, falling, above 0 and at most 1, as in
            diffusers; as many steps are made.
        skip: steps in which the transformer does not run, and the velocity is extrapolated: "auto"
            are those that `fluxdeploy tune` has found for so many steps; or their numbers from 1
            on, or `Skips` with the order of the extrapolation.
        lora: a LoRA file, a pair (file, scale), or a list of these, for a bundle that was built
            with `--lora-rank`: at each linear their ranks add up to that at most. What they change
            in text encoders is left out.
        callback_on_step_end: see `PipelineCallback`. callback_on_step_end_tensor_inputs: what it is
            given: "latents", or nothing.
        num_previews, callback_on_preview: how many pictures to show on the way, evenly from a fifth
            of the steps on, and what is called with them: see `PreviewCallback`. Each costs a run
            of the VAE decoder.
        preview_decoder: "linear" calls `callback_on_preview` after each step, without
            `num_previews`. Its pictures have a pixel for each latent, an eighth of the size, and
            cost nearly nothing: colours by a linear map that the bundle has.
        cancel: ends this call wherever it is, even while it waits for its turn.
        priority: "high", "normal" or "low"; between two steps, a higher one goes first.
        output_type: "pil", "np", or "latent" for the last latents, packed and not decoded.
        return_dict: False for diffusers' tuple `(images,)`, of which type checkers do not know.
        positional, others: refused, with a sentence on what diffusers has under that name.

        Warns once, with `UnusedArgumentWarning`, of an argument that does nothing beside the
        others, and with `CutPromptWarning` of a prompt that an encoder does not read to its end.
        Warns once, with `TiledWarning`, where memory made the VAE run in tiles.
        Raises `UsageError` for an argument outside its range, and for what takes far more memory
        than is free, before anything runs; `NumericError` where a component gave NaN or infinity,
        `CheckpointError` where a file is no LoRA of this model, `Cancelled` where `cancel` was,
        `EngineError` where an engine fails, `QueueFullError` where as many calls wait as `limits`
        allow.
        """
        refuse_arguments(positional, others)
        output = self._generate(
            {
                "prompt": prompt,
                "prompt_2": prompt_2,
                "negative_prompt": negative_prompt,
                "negative_prompt_2": negative_prompt_2,
                "true_cfg_scale": true_cfg_scale,
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "num_images_per_prompt": num_images_per_prompt,
                "seed": seed,
                "latents": latents,
                "prompt_embeds": prompt_embeds,
                "pooled_prompt_embeds": pooled_prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
                "redux_image": redux_image,
                "prompt_embeds_scale": prompt_embeds_scale,
                "pooled_prompt_embeds_scale": pooled_prompt_embeds_scale,
                "max_sequence_length": max_sequence_length,
                "sampler": sampler,
                "sigmas": sigmas,
                "skip": skip,
            },
            {
                "image": image,
                "mask_image": mask_image,
                "strength": strength,
                "padding_mask_crop": padding_mask_crop,
                "control_image": control_image,
                "control_mode": control_mode,
                "controlnet_conditioning_scale": controlnet_conditioning_scale,
                "control_guidance_start": control_guidance_start,
                "control_guidance_end": control_guidance_end,
                "max_area": max_area,
                "auto_resize": auto_resize,
            },
            CallOptions(
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                num_previews,
                callback_on_preview,
                preview_decoder,
                cancel,
                priority,
                output_type,
                return_dict,
            ),
            check_loras(lora),
            {
                "ip_adapter_image": ip_adapter_image,
                "ip_adapter_image_embeds": ip_adapter_image_embeds,
                "negative_ip_adapter_image": negative_ip_adapter_image,
                "negative_ip_adapter_image_embeds": negative_ip_adapter_image_embeds,
            },
            ip_adapter_scale,
        )
        return output if return_dict else (output.images,)  # type: ignore[return-value]

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        """diffusers' way to open a checkpoint; raises `UsageError`, which says what is ours."""
        raise UsageError(
            "Checkpoints are not opened here. Make a bundle with `fluxdeploy build CHECKPOINT`, "
            "and open it with `FluxPipeline.from_bundle`."
        )

    if not TYPE_CHECKING:  # for which any name would be one

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(missing_attribute(name), name=name, obj=self)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ATTRIBUTES:
            raise UsageError(missing_attribute(name))
        super().__setattr__(name, value)

    @property
    def interrupt(self) -> bool:
        """Whether `pipe._interrupt = True` was said since the last call began."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._is_interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """diffusers' way to stop: calls that have begun make no step more, and give what is there.

        A call of one of several threads is ended by a `CancelToken`.
        """
        self._is_interrupted = check_flag("_interrupt", value)
        self._interrupts += self._is_interrupted

    def set_progress_bar_config(
        self, *, disable: bool | None = False, desc: str = "Drawing", **others: object
    ) -> None:
        """Show the steps of each call on stderr, which nothing does before this was called.

        disable: True for nothing, None for nothing where stderr is no terminal. desc: what the bar
        says. Warns with `UnusedArgumentWarning` of other arguments that tqdm, diffusers' bar, has.
        """
        if disable is not None:
            disable = check_flag("disable", disable)
        if not isinstance(desc, str):
            raise UsageError(f"`desc` must be a string, not {shown(desc)}.")
        for name in others:
            notice = f"`{name}` does nothing here: the progress bar takes `disable` and `desc`."
            warnings.warn(notice, UnusedArgumentWarning, stacklevel=2)
        self._bar = disable, desc

    def warm_up(self) -> None:
        """Open every engine of the bundle, and run it once. Raises what a call raises."""
        manifest = self._bundle.manifest
        height, width = manifest.defaults.height, manifest.defaults.width
        given = example_arguments(manifest, height, width)
        given = given or example_control(manifest, height, width)
        if not given and "vae_encoder" in manifest.components:
            given = {"image": example_picture(height, width), "strength": 0.5}
        given |= example_seen(manifest)
        given |= example_variation(manifest, height, width)
        self("warm-up", num_inference_steps=2, seed=0, **given)

    def close(self) -> None:
        """Free the engines, the encoded prompts and the LoRAs, after the running call.

        A later call opens the engines again.
        """
        with self._turns.alone():
            self._components.close()
            self._encoder.forget()
            self._loras.forget()

    def __enter__(self) -> FluxPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self,
        arguments: Mapping[str, Any],
        of_tasks: Mapping[str, Any],
        options: CallOptions,
        loras: Sequence[LoraFile],
        seen: Mapping[str, Any],
        seen_scale: object,
    ) -> FluxPipelineOutput:
        """A call: `arguments` of every picture, those that belong to tasks, and what is seen."""
        manifest = self._bundle.manifest
        options.check()
        kind, unused = choose_task(TASKS, manifest.tasks, of_tasks)
        height, width = kind.size(manifest, arguments["height"], arguments["width"], of_tasks)
        arguments = {**arguments, "height": height, "width": width}
        drawing = arguments["latents"] is None or kind.draws_more
        if arguments["seed"] is None and drawing:
            arguments = {**arguments, "seed": int.from_bytes(os.urandom(4), "little")}
        request = check_request(manifest, **arguments)
        request = request if drawing else replace(request, seed=None)
        for component in kind.components:
            if component not in manifest.components:
                raise UsageError(
                    f"This bundle has no {component}, which {kind.name} takes. Build it again with "
                    f"one, or leave out {' and '.join(f'`{name}`' for name in kind.chosen_by)}."
                )
        task = kind.read(request, manifest, of_tasks)
        if options.output_type == "latent" and of_tasks["padding_mask_crop"] is not None:
            raise UsageError(
                "`padding_mask_crop` lays what was drawn over the image, and latents cannot be. "
                "Leave it out, or use another output_type."
            )
        side_inputs = self._loras.read(tuple(loras))
        adapter = read_adapter(request, manifest, seen, seen_scale)
        idle = (
            *unused,
            *idle_arguments(manifest, arguments, drawing),
            *task.notices(),
            *side_inputs.notices,
            *adapter.notices,
        )
        cuts = self._cuts(request)
        self._tell(idle)
        for notice in cuts:
            warnings.warn(notice, CutPromptWarning, stacklevel=3)
        if request.skip is not None and isinstance(arguments["skip"], str):
            cuts += self._tell_unmeasured(request)
        previews = self._previews(options, task)
        asked = demand(task, options.priority, side_inputs.nbytes, adapter.tokens)
        latents_only = options.output_type == "latent"
        check_memory(task, asked.memory, latents_only)
        token = CancelToken() if options.cancel is None else options.cancel
        tiles: list[str] = []
        with (
            self._turns.taken(token, asked) as turn,
            self._shown_steps(task.steps) as advance,
        ):
            self._is_interrupted, interrupts = False, self._interrupts
            try:
                pictures = make_pictures(
                    task,
                    self._components,
                    self._encoder,
                    side_inputs,
                    adapter,
                    self._step_callback(options, advance),
                    previews,
                    turn,
                    lambda: self._interrupts != interrupts,
                    tiles.append,
                    latents_only=latents_only,
                )
                self._pictures += len(pictures)
            except BaseException:
                self._components.release_all()
                raise
        self._tell(tiles, TiledWarning)
        notices = (*idle, *cuts, *tiles)
        return FluxPipelineOutput(
            options.finished(task, pictures), request.seed, turn.seconds, notices
        )

    def _previews(self, options: CallOptions, task: Task) -> Wanted | None:
        """Which previews to make. Raises `UsageError` for a bundle that cannot make cheap ones."""
        callback, linear = options.callback_on_preview, None
        if options.preview_decoder == "linear":
            linear = require_linear(self._bundle.manifest)
        elif options.num_previews == 0:
            return None
        assert callback is not None  # or the options are refused

        def show(steps: int, pictures: NDArray[np.float32]) -> None:
            callback(self, steps, options.finished(task, pictures))

        return Wanted(options.num_previews, linear, show)

    def _tell(self, notices: Sequence[str], kind: type[Warning] = UnusedArgumentWarning) -> None:
        """Warn the caller of `__call__`, of each thing once."""
        for notice in notices:
            if notice not in self._told:
                self._told.add(notice)
                warnings.warn(notice, kind, stacklevel=4)

    def _tell_unmeasured(self, request: GenerationRequest) -> list[str]:
        """Warn the caller of `__call__` where skips were measured at another size."""
        notices = unmeasured(
            self._bundle.manifest,
            request.sampler,
            request.num_inference_steps,
            request.height,
            request.width,
        )
        for notice in notices:
            warnings.warn(notice, UnmeasuredSkipsWarning, stacklevel=4)
        return list(notices)

    def _cuts(self, request: GenerationRequest) -> list[str]:
        """A sentence for each prompt that is not read to its end."""
        length = request.max_sequence_length
        return [
            *self._encoder.cuts(request.text, length, "The prompt"),
            *self._encoder.cuts(request.negative, length, "The negative prompt"),
        ]

    @contextmanager
    def _shown_steps(self, steps: int) -> Iterator[Callable[[], None] | None]:
        """What to call after each step, where a progress bar is asked for."""
        disable, desc = self._bar
        if disable or (disable is None and not sys.stderr.isatty()):
            yield None
            return
        with Progress() as progress:
            yield progress.task(desc, steps).advance

    def _step_callback(
        self, options: CallOptions, advance: Callable[[], None] | None
    ) -> LevelCallback | None:
        callback = options.callback_on_step_end
        if callback is None and advance is None:
            return None

        def on_step_end(
            step: int, sigma: np.float32, latents: NDArray[np.float32]
        ) -> NDArray[np.float32] | None:
            if advance is not None:
                advance()
            if callback is None:
                return None
            timestep = float(sigma * np.float32(1000))
            # A view: what a callback does to its flags and its shape stays with the callback.
            state = {name: latents.view() for name in options.callback_on_step_end_tensor_inputs}
            return replaced_latents(callback(self, step, timestep, state))

        return on_step_end


def _check_limits(limits: object) -> QueueLimits:
    if limits is None:
        return QueueLimits()
    if not isinstance(limits, QueueLimits):
        raise UsageError(f"`limits` must be QueueLimits, not {shown(limits)}.")
    return limits
