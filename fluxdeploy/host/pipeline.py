"""From a prompt to pictures: `FluxPipeline` runs a bundle's engines on NumPy arrays."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engines import open_engine
from engines.base import Array, Engine, EngineOptions
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import Cancelled, UsageError
from fluxdeploy.host.loop import ModulatedTransformer, StepCallback, check_finite, sample_euler
from fluxdeploy.host.pictures import to_pil
from fluxdeploy.host.request import GenerationRequest, check_request
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.latents import latent_shape, pack, token_grid, unpack, unscale
from fluxdeploy.sampling.noise import check_seed, standard_normal
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.text import Tokenizers, load_tokenizers

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FluxPipeline", "FluxPipelineOutput", "PipelineCallback"]

PipelineCallback = Callable[
    ["FluxPipeline", int, float, dict[str, Any]], "Mapping[str, Any] | None"
]
"""`callback_on_step_end(pipe, step, timestep, callback_kwargs)`, as in diffusers.

`timestep` is 1000 times the step's noise level. `callback_kwargs["latents"]` is the live array,
float32 [B, L, C], packed: copy it to keep it. A returned `{"latents": x}` replaces it.
"""

_SIZE_WORDS = {
    "B": "prompts or pictures at once",
    "S": "text tokens (max_sequence_length)",
    "L": "image tokens (they grow with height x width)",
    "T": "text and image tokens together",
    "N": "steps (num_inference_steps)",
    "H": "rows of pixels (height)",
    "W": "columns of pixels (width)",
    "h": "rows of latents (they grow with height)",
    "w": "columns of latents (they grow with width)",
}


@dataclass(frozen=True)
class FluxPipelineOutput:
    """What a call made.

    images: a list of `PIL.Image.Image`, or float32 [B, H, W, 3] in 0..1 with output_type="np".
    seed: the seed that makes these pictures again; None where the caller gave the latents.
    """

    images: list[Image] | NDArray[np.float32]
    seed: int | None


@dataclass(frozen=True)
class _Condition:
    """What prompts and schedule make of the transformer: N steps, U distinct prompts, B pictures.

    context: float32 [B, S, D]. modulation: float32 [N, U, M, D]. pictures: [B], the prompt of each.
    """

    context: NDArray[np.float32]
    modulation: NDArray[np.float32]
    pictures: NDArray[np.int64]


class FluxPipeline:
    """Makes pictures from a bundle. A context manager; `close` frees the engines.

    Engines are opened by the first call and kept. Calls from several threads take turns. With
    `low_vram` an engine is open only while it is needed: text encoders and conditioner, then the
    transformer, then the decoder. Memory then holds the largest of them instead of all, and every
    call reads the engines again.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizers: Tokenizers,
        open_component: Callable[[str], Engine],
        low_vram: bool = False,
    ) -> None:
        """Use `from_bundle`, unless the components shall run on something else than engines."""
        self._bundle = bundle
        self._tokenizers = tokenizers
        self._open_component = open_component
        self._low_vram = low_vram
        self._engines: dict[str, Engine] = {}
        # Reentrant: a callback may make another picture, or close the pipeline before it raises.
        self._turn = threading.RLock()
        self._interrupted = threading.Event()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "auto",
        options: EngineOptions | None = None,
        low_vram: bool = False,
    ) -> FluxPipeline:
        """Open the bundle in the folder `path`, to be run by `runtime`.

        Raises `BundleError` where the folder is no bundle that this version reads.
        """
        bundle = open_bundle(Path(path))
        open_component = functools.partial(open_engine, bundle, runtime=runtime, options=options)
        return cls(bundle, load_tokenizers(bundle), open_component, low_vram)

    @property
    def bundle(self) -> Bundle:
        """The bundle that the pictures come from."""
        return self._bundle

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        latents: ArrayLike | None = None,
        image: object | None = None,
        mask_image: object | None = None,
        strength: float = 0.6,
        max_sequence_length: int | None = None,
        callback_on_step_end: PipelineCallback | None = None,
        output_type: Literal["pil", "np"] = "pil",
    ) -> FluxPipelineOutput:
        """Make `num_images_per_prompt` pictures of each prompt: p0, p0, p1, p1.

        prompt: one, or a list of them. height, width: pixels. height, width, num_inference_steps
            and guidance_scale: the bundle's defaults where None.
        negative_prompt: what to steer away from, one for all or one a prompt; used where
            true_cfg_scale > 1, and doubles the work.
        guidance_scale: ignored by bundles without a guidance embedding (FLUX.1-schnell).
        seed: 0 to 2^64 - 1; the picture equals diffusers' with a CPU generator of that seed. One is
            drawn where None.
        latents: the noise to start from, float32 [B, L, C], packed as in diffusers; no seed then.
        image, mask_image, strength: image to image and inpainting, which this version refuses.
        max_sequence_length: the number of T5 tokens that a prompt is padded or cut to.
        callback_on_step_end: see `PipelineCallback`.
        output_type: "pil" or "np".

        Raises `UsageError` for an argument outside its range, `NumericError` where a component
        gave NaN or infinity, `Cancelled` after `interrupt`, `EngineError` where an engine fails.
        """
        if image is not None or mask_image is not None:
            raise UsageError(
                "This version makes pictures from text only. Leave out `image` and `mask_image`."
            )
        if output_type not in ("pil", "np"):
            raise UsageError(f"The output_type {output_type!r} is unknown. Use 'pil' or 'np'.")
        request = check_request(
            self._bundle.manifest,
            prompt=prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        if seed is not None:
            check_seed(seed)
            seed = int(seed)
        with self._turn:
            self._interrupted.clear()
            self._check_engine_sizes(request)
            if latents is not None:
                seed, start = None, self._check_latents(latents, request)
            else:
                seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
                start = self._draw_latents(seed, request)
            tokens = self._denoise(start, request, callback_on_step_end)
            self._release("transformer")
            pictures = self._decode(tokens, request)
            self._release("vae_decoder")
        return FluxPipelineOutput(pictures if output_type == "np" else to_pil(pictures), seed)

    def interrupt(self) -> None:
        """Stop the call that is running, before its next step; it raises `Cancelled`.

        May be called by the callback or by another thread. Without a running call it does nothing.
        """
        self._interrupted.set()

    def close(self) -> None:
        """Free the engines, after the running call. A later call opens them again."""
        with self._turn:
            while self._engines:
                self._engines.popitem()[1].close()

    def __enter__(self) -> FluxPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _manifest(self) -> Manifest:
        return self._bundle.manifest

    def _engine(self, component: str) -> Engine:
        if component not in self._engines:
            self._engines[component] = self._open_component(component)
        return self._engines[component]

    def _release(self, *components: str) -> None:
        """Close engines that this call needs no more, where memory is short."""
        for component in components:
            if self._low_vram and component in self._engines:
                self._engines.pop(component).close()

    def _run(self, component: str, output: str, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """One output of a component, checked to be finite."""
        values = np.asarray(self._engine(component).run(inputs)[output], np.float32)
        check_finite(values, component)
        return values

    def _check_engine_sizes(self, request: GenerationRequest) -> None:
        """Refuse what one of the engines cannot do, before the long work.

        All of them are opened here, so that one that is broken is known as early, unless memory is
        to hold one at a time: then the manifest tells what they can do.
        """
        for component, symbols in request.engine_sizes(self._manifest).items():
            if self._low_vram:
                ranges = self._manifest.components[component].engines[0].dimensions
            else:
                ranges = self._engine(component).dimensions
            for symbol, size in symbols.items():
                allowed = ranges.get(symbol)
                if allowed is not None and not allowed.min <= size <= allowed.max:
                    raise UsageError(
                        f"This bundle's {component} takes {allowed.min} to {allowed.max} "
                        f"{_SIZE_WORDS[symbol]}, not {size}. Ask for a size in that range, or "
                        "build the bundle with a wider one."
                    )

    def _check_latents(self, latents: ArrayLike, request: GenerationRequest) -> NDArray[np.float32]:
        """A copy of the caller's packed latents, since the sampler works in place."""
        spec = self._manifest.latents
        rows, columns = token_grid(request.height, request.width, spec)
        expected = (request.batch, rows * columns, spec.channels * spec.patch_size**2)
        start = np.array(latents, np.float32, order="C")
        if start.shape != expected:
            raise UsageError(
                f"`latents` has shape {list(start.shape)}; for {request.batch} pictures of "
                f"{request.width}x{request.height} pixels it must be {list(expected)}, packed."
            )
        if not np.isfinite(start).all():
            raise UsageError("`latents` holds NaN or infinity. Give finite values.")
        return start

    def _draw_latents(self, seed: int, request: GenerationRequest) -> NDArray[np.float32]:
        spec = self._manifest.latents
        noise = standard_normal(
            latent_shape(request.batch, request.height, request.width, spec), seed
        )
        return pack(noise, spec)

    def _denoise(
        self,
        latents: NDArray[np.float32],
        request: GenerationRequest,
        callback: PipelineCallback | None,
    ) -> NDArray[np.float32]:
        """Turn noise [B, L, C] into the picture's latents, in place."""
        manifest = self._manifest
        rows, columns = token_grid(request.height, request.width, manifest.latents)
        sigmas = schedule.sigmas(manifest.schedule, request.num_inference_steps, rows * columns)
        cos, sin = rope_tables(joint_ids(request.max_sequence_length, rows, columns), manifest.rope)
        rope = {"rope_cos": cos, "rope_sin": sin}
        condition = self._condition(request.prompts, request, sigmas[:-1])
        opposite = None
        if request.negative_prompts is not None:
            opposite = self._condition(request.negative_prompts, request, sigmas[:-1])
        self._release("clip", "t5", "conditioner")
        velocity = self._bind(condition, rope)
        negative = None if opposite is None else self._bind(opposite, rope)
        sample_euler(
            latents,
            sigmas,
            velocity,
            negative=negative,
            true_cfg_scale=request.true_cfg_scale,
            on_step_end=None if callback is None else self._step_callback(callback, sigmas),
            interrupted=self._interrupted.is_set,
        )
        return latents

    def _condition(
        self,
        prompts: Sequence[str],
        request: GenerationRequest,
        timesteps: NDArray[np.float32],
    ) -> _Condition:
        """Encode prompts for the whole schedule.

        A prompt that occurs twice is encoded once: U distinct prompts for B pictures.
        """
        distinct = list(dict.fromkeys(prompts))
        clip_ids = self._tokenizers.clip(distinct)
        t5_ids = self._tokenizers.t5(distinct, request.max_sequence_length)
        pooled = self._run("clip", "pooled_embeddings", {"input_ids": clip_ids})
        text = self._run("t5", "text_embeddings", {"input_ids": t5_ids})
        inputs: dict[str, Array] = {
            "text_embeddings": text,
            "pooled_embeddings": pooled,
            "timestep": timesteps,
        }
        if self._manifest.guidance_embedding:
            inputs["guidance"] = np.full(len(distinct), request.guidance_scale, np.float32)
        outputs = self._engine("conditioner").run(inputs)
        for values in outputs.values():
            check_finite(values, "conditioner")
        pictures = np.repeat(
            [distinct.index(prompt) for prompt in prompts], request.num_images_per_prompt
        )
        context = np.asarray(outputs["context"], np.float32)[pictures]
        return _Condition(context, np.asarray(outputs["modulation"], np.float32), pictures)

    def _bind(self, condition: _Condition, rope: Mapping[str, Array]) -> ModulatedTransformer:
        """The transformer with all that no step changes in place."""
        binding = self._engine("transformer").bind({"context": condition.context, **rope})
        return ModulatedTransformer(binding, condition.modulation, condition.pictures)

    def _step_callback(
        self, callback: PipelineCallback, sigmas: NDArray[np.float32]
    ) -> StepCallback:
        def on_step_end(step: int, latents: NDArray[np.float32]) -> NDArray[np.float32] | None:
            timestep = float(sigmas[step] * np.float32(1000))
            answer = callback(self, step, timestep, {"latents": latents})
            if answer is None:
                return None
            if not isinstance(answer, Mapping):
                raise UsageError(
                    f"callback_on_step_end returned a {type(answer).__name__}. It must return "
                    'None or a dictionary such as {"latents": latents}.'
                )
            return answer.get("latents")

        return on_step_end

    def _decode(
        self, tokens: NDArray[np.float32], request: GenerationRequest
    ) -> NDArray[np.float32]:
        """Pictures, float32 [B, H, W, 3] in 0..1, of packed latents [B, L, C].

        One at a time: the decoder's memory grows with the number of pixels, and it fills a device
        with one picture already.
        """
        spec = self._manifest.latents
        latents = unscale(unpack(tokens, request.height, request.width, spec), spec)
        pictures = np.empty((request.batch, request.height, request.width, 3), np.float32)
        for index, picture in enumerate(pictures):
            if self._interrupted.is_set():
                raise Cancelled("Interrupted before decoding; no picture was made.")
            decoded = self._run("vae_decoder", "images", {"latents": latents[index : index + 1]})
            np.clip(decoded[0].transpose(1, 2, 0) * 0.5 + 0.5, 0.0, 1.0, out=picture)
        return pictures
