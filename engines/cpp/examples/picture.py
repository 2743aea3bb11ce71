"""A picture through the C interface, by ctypes: picture.py LIBRARY BUNDLE PROMPT FILE.png"""

import ctypes
import sys
from ctypes import byref, c_char_p, c_int64, c_size_t, c_uint64, c_void_p


def main(library: str, bundle: str, prompt: str, file: str) -> None:
    flux = ctypes.CDLL(library)
    flux.fluxdeploy_error_message.restype = c_char_p
    for name in ("request_new", "result_pixels"):
        getattr(flux, f"fluxdeploy_{name}").restype = c_void_p
    for name in ("result_width", "result_height"):
        getattr(flux, f"fluxdeploy_{name}").restype = c_int64
    error = c_void_p()

    def check(code: int) -> None:
        if code:
            sys.exit(flux.fluxdeploy_error_message(error).decode())

    pipeline, result = c_void_p(), c_void_p()
    check(flux.fluxdeploy_pipeline_open(bundle.encode(), None, byref(pipeline), byref(error)))
    request, text = c_void_p(flux.fluxdeploy_request_new()), prompt.encode()
    flux.fluxdeploy_request_add_prompt(request, text, c_size_t(len(text)))
    flux.fluxdeploy_request_set_seed(request, c_uint64(7))
    check(flux.fluxdeploy_pipeline_generate(pipeline, request, byref(result), byref(error)))
    width, height = flux.fluxdeploy_result_width(result), flux.fluxdeploy_result_height(result)
    pixels = c_void_p(flux.fluxdeploy_result_pixels(result, c_int64(0)))
    size = c_int64(width), c_int64(height)
    check(
        flux.fluxdeploy_write_png(
            file.encode(), pixels, *size, None, None, c_size_t(0), byref(error)
        )
    )
    flux.fluxdeploy_result_free(result)
    flux.fluxdeploy_request_free(request)
    flux.fluxdeploy_pipeline_free(pipeline)


if __name__ == "__main__":
    main(*sys.argv[1:])
