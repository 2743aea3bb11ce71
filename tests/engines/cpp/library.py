"""The C++ library through its C interface: what a program without a C compiler does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODES", "Failure", "Library", "Pipeline", "Step"]

CODES = (
    "ok",
    "usage",
    "bundle",
    "engine",
    "numeric",
    "cancelled",
    "missing dependency",
    "internal",
)

_SETTERS = {
    "true_cfg_scale": c_double,
    "height": c_int64,
    "width": c_int64,
    "num_inference_steps": c_int64,
    "guidance_scale": c_double,
    "num_images_per_prompt": c_int64,
    "max_sequence_length": c_int64,
    "strength": c_double,
    "padding_mask_crop": c_int64,
    "references": c_int64,
    "max_area": c_int64,
    "auto_resize": c_int,
    "preview": c_int,
}

# Numbers for each ControlNet.
_LISTS = {
    "control_mode": c_int64,
    "controlnet_conditioning_scale": c_double,
    "control_guidance_start": c_double,
    "control_guidance_end": c_double,
}


class Step(ctypes.Structure):
    """`fluxdeploy_step`."""

    _fields_ = (
        ("step", c_int64),
        ("total", c_int64),
        ("timestep", c_double),
        ("latents", POINTER(c_float)),
        ("batch", c_int64),
        ("tokens", c_int64),
        ("channels", c_int64),
        ("preview", POINTER(c_uint8)),
        ("preview_width", c_int64),
        ("preview_height", c_int64),
    )

    def view(self) -> NDArray[np.float32]:
        """The live latents, float32 [B, L, C]."""
        shape = (self.batch, self.tokens, self.channels)
        return np.ctypeslib.as_array(self.latents, shape)

    def previews(self) -> NDArray[np.uint8] | None:
        """A copy of the previews, uint8 [B, h, w, 3], where there are any."""
        if not self.preview:
            return None
        shape = (self.batch, self.preview_height, self.preview_width, 3)
        return np.ctypeslib.as_array(self.preview, shape).copy()


_CALLBACK = CFUNCTYPE(c_int, c_void_p, POINTER(Step))
_CHECK = CFUNCTYPE(None, c_void_p, c_char_p, c_double, c_double)


class Failure(Exception):
    """What a function returned: the code in words, and the sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Library:
    """The functions of `fluxdeploy.h`."""

    def __init__(self, path: Path, onnxruntime: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.onnxruntime = onnxruntime
        for name in (
            "options_new",
            "request_new",
            "cancel_new",
            "result_pixels",
            "picture_rgb",
            "picture_mask",
        ):
            self._returns(name, c_void_p)
        for name in ("error_message", "result_notice", "pipeline_bundle_hash", "version"):
            self._returns(name, c_char_p)
        for name in (
            "result_count",
            "result_width",
            "result_height",
            "result_steps",
            "picture_width",
            "picture_height",
        ):
            self._returns(name, c_int64)
        self._returns("result_seed", c_uint64)
        self._returns("pipeline_default", c_double)

    def _returns(self, name: str, kind: Any) -> None:
        getattr(self.c, f"fluxdeploy_{name}").restype = kind

    def call(self, name: str, *arguments: Any) -> None:
        """A function that returns a code and takes an error. Raises `Failure`."""
        error = c_void_p()
        code = getattr(self.c, f"fluxdeploy_{name}")(*arguments, byref(error))
        if code:
            message = self.c.fluxdeploy_error_message(error).decode()
            assert self.c.fluxdeploy_error_code(error) == code
            self.c.fluxdeploy_error_free(error)
            raise Failure(CODES[code], message)
        assert error.value is None

    def noise(self, seed: int, count: int) -> NDArray[np.float32]:
        """`count` numbers of a seed."""
        values = np.empty(count, np.float32)
        self.call("noise", c_uint64(seed), c_void_p(values.ctypes.data), c_size_t(count))
        return values

    def outpaint(
        self, picture: NDArray[np.uint8], margins: Sequence[int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The canvas around a picture, and the mask of its margins, both uint8 [H, W, 3]."""
        made = c_void_p()
        size = (c_int64(picture.shape[1]), c_int64(picture.shape[0]))
        sides = map(c_int64, margins)
        self.call("outpaint_canvas", picture.tobytes(), *size, *sides, byref(made))
        height, width = (
            self.c.fluxdeploy_picture_height(made),
            self.c.fluxdeploy_picture_width(made),
        )
        both = [
            np.frombuffer(ctypes.string_at(address, height * width * 3), np.uint8)
            for address in (
                self.c.fluxdeploy_picture_rgb(made),
                self.c.fluxdeploy_picture_mask(made),
            )
        ]
        self.c.fluxdeploy_picture_free(made)
        return both[0].reshape(height, width, 3), both[1].reshape(height, width, 3)

    def pipeline(self, bundle: Path, **options: Any) -> Pipeline:
        """Open a bundle; options are those of `fluxdeploy_options`."""
        given = c_void_p(self.c.fluxdeploy_options_new())
        library = str(options.pop("library", self.onnxruntime)).encode()
        self.c.fluxdeploy_options_set_library(given, b"onnxruntime", library)
        for name, value in options.items():
            argument = value.encode() if isinstance(value, str) else c_int64(value)
            getattr(self.c, f"fluxdeploy_options_set_{name}")(given, argument)
        handle = c_void_p()
        try:
            self.call("pipeline_open", str(bundle).encode(), given, byref(handle))
        finally:
            self.c.fluxdeploy_options_free(given)
        return Pipeline(self, handle)


class Pipeline:
    """A `fluxdeploy_pipeline`, called with the names of `FluxPipeline`."""

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library, self.handle = library, handle

    def clone(self) -> Pipeline:
        handle = c_void_p()
        self.library.call("pipeline_clone", self.handle, byref(handle))
        return Pipeline(self.library, handle)

    def close(self) -> None:
        self.library.c.fluxdeploy_pipeline_free(self.handle)

    def check(self) -> dict[str, tuple[float, float]]:
        """For each component `max_error` and `cosine` of its golden tensors."""
        found: dict[str, tuple[float, float]] = {}

        def each(user: Any, name: bytes, max_error: float, cosine: float) -> None:
            found[name.decode()] = max_error, cosine

        self.library.call("pipeline_check", self.handle, _CHECK(each), None)
        return found

    def tokenize(self, tokenizer: str, prompt: str, length: int = 0) -> list[int]:
        ids, count, text = (c_int32 * 4096)(), c_size_t(), prompt.encode()
        self.library.call(
            "pipeline_tokenize",
            self.handle,
            tokenizer.encode(),
            text,
            c_size_t(len(text)),
            c_int64(length),
            ids,
            c_size_t(4096),
            byref(count),
        )
        return list(ids[: count.value])

    def __call__(
        self,
        prompt: str | Sequence[str] = (),
        negative_prompt: str | Sequence[str] = (),
        prompt_2: str | Sequence[str] = (),
        negative_prompt_2: str | Sequence[str] = (),
        ids: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        latents: NDArray[np.float32] | None = None,
        image: Sequence[NDArray[np.uint8]] = (),
        mask_image: Sequence[NDArray[np.uint8]] = (),
        control_image: Sequence[NDArray[np.uint8] | Sequence[NDArray[np.uint8]]] = (),
        sampler: str | None = None,
        skip: str | Sequence[int] = "none",
        sigmas: Sequence[float] = (),
        seed: int | Sequence[int] = (),
        embeds: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
        on_step: Callable[[Step], int] | None = None,
        cancel: c_void_p | None = None,
        **numbers: Any,
    ) -> tuple[NDArray[np.uint8], list[str], int | None]:
        """Pictures, uint8 [B, H, W, 3], the notices, and the seed."""
        c = self.library.c
        request = c_void_p(c.fluxdeploy_request_new())
        kept: list[Any] = []
        try:
            said = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "prompt_2": prompt_2,
                "negative_prompt_2": negative_prompt_2,
            }
            for name, texts in said.items():
                for text in [texts] if isinstance(texts, str) else texts:
                    data = text.encode("utf-8", "surrogatepass")
                    getattr(c, f"fluxdeploy_request_add_{name}")(request, data, c_size_t(len(data)))
            for clip, t5 in ids:
                rows = [np.asarray(row, np.int32) for row in (clip, t5)]
                c.fluxdeploy_request_add_prompt_ids(
                    request,
                    *(x for row in rows for x in (c_void_p(row.ctypes.data), c_size_t(len(row)))),
                )
            for name, array in embeds.items():
                own = np.ascontiguousarray(array, np.float32)
                shape = (c_int64 * own.ndim)(*own.shape)
                setter = getattr(c, f"fluxdeploy_request_set_{name}")
                assert not setter(request, c_void_p(own.ctypes.data), shape, c_size_t(own.ndim))
            if isinstance(seed, int):
                c.fluxdeploy_request_set_seed(request, c_uint64(seed))
            else:
                seeds = (c_uint64 * len(seed))(*seed)
                c.fluxdeploy_request_set_seeds(request, seeds, c_size_t(len(seed)))
            levels = (c_float * len(sigmas))(*sigmas)
            c.fluxdeploy_request_set_sigmas(request, levels, c_size_t(len(sigmas)))
            for name, value in numbers.items():
                setter = getattr(c, f"fluxdeploy_request_set_{name}")
                if name in _LISTS:
                    values = value if isinstance(value, list) else [value]
                    array = (_LISTS[name] * len(values))(*values)
                    assert not setter(request, array, c_size_t(len(values)))
                else:
                    setter(request, _SETTERS[name](value))
            if sampler is not None:
                c.fluxdeploy_request_set_sampler(request, sampler.encode())
            if skip == "auto":
                c.fluxdeploy_request_set_skip_recorded(request, 1)
            elif skip != "none":
                steps = np.asarray(skip, np.int64)
                address = c_void_p(steps.ctypes.data)
                c.fluxdeploy_request_set_skip(request, address, c_size_t(steps.size))
            if latents is not None:
                array = np.ascontiguousarray(latents, np.float32)
                c.fluxdeploy_request_set_latents(
                    request, c_void_p(array.ctypes.data), c_size_t(array.size)
                )
            for name, pictures in {"image": image, "mask_image": mask_image}.items():
                for picture in pictures:
                    self._add(name, picture, request)
            for place, entry in enumerate(control_image):
                if isinstance(entry, np.ndarray):
                    self._add("control_image", entry, request)
                    continue
                for picture in entry:
                    self._add("controlnet_image", picture, request, c_int64(place))
            if on_step is not None:
                callback = _CALLBACK(lambda user, step: on_step(step.contents))
                kept.append(callback)
                c.fluxdeploy_request_set_callback(request, callback, None)
            if cancel is not None:
                c.fluxdeploy_request_set_cancel(request, cancel)
            result = c_void_p()
            self.library.call("pipeline_generate", self.handle, request, byref(result))
        finally:
            c.fluxdeploy_request_free(request)
        try:
            return self._read(result)
        finally:
            c.fluxdeploy_result_free(result)

    def _add(self, name: str, picture: NDArray[np.uint8], *of: Any) -> None:
        """A picture for a request, and where it has several of them, for which."""
        pixels = np.ascontiguousarray(picture)
        code = getattr(self.library.c, f"fluxdeploy_request_add_{name}")(
            *of,
            pixels.ctypes.data_as(POINTER(c_uint8)),
            c_int64(picture.shape[1]),
            c_int64(picture.shape[0]),
        )
        assert code == 0

    def _read(self, result: c_void_p) -> tuple[NDArray[np.uint8], list[str], int | None]:
        c = self.library.c
        height, width = c.fluxdeploy_result_height(result), c.fluxdeploy_result_width(result)
        pictures = []
        for index in range(c.fluxdeploy_result_count(result)):
            address = c.fluxdeploy_result_pixels(result, c_int64(index))
            data = ctypes.string_at(address, height * width * 3)
            pictures.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
        notices = []
        while (text := c.fluxdeploy_result_notice(result, c_size_t(len(notices)))) is not None:
            notices.append(text.decode())
        seed = c.fluxdeploy_result_seed(result) if c.fluxdeploy_result_has_seed(result) else None
        return np.stack(pictures), notices, seed
