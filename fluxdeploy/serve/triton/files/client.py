"""Draws a picture on a Triton server that has the model `flux`, and shows it on the way.

    pip install "tritonclient[grpc]" pillow
    python client.py "a red circle above a blue square" --seed 7 --previews 3

Ctrl-C cancels the request on the server too.
"""

from __future__ import annotations

import argparse
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

MODEL = "flux"
OUTPUTS = ("image", "seeds", "event", "step", "seconds")

TYPES = {
    "prompt": np.object_,
    "negative_prompt": np.object_,
    "true_cfg_scale": np.float64,
    "height": np.int32,
    "width": np.int32,
    "num_inference_steps": np.int32,
    "guidance_scale": np.float64,
    "n": np.int32,
    "seed": np.uint64,
    "strength": np.float64,
    "image_bytes": np.object_,
    "num_previews": np.int32,
    "priority": np.object_,
}


def request_input(name: str, value: object) -> grpc.InferInput:
    """A field of a request as the tensor that it is."""
    if isinstance(value, str):
        value = value.encode()
    values: Any = np.array([value], TYPES[name])
    tensor = grpc.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values)
    return tensor


def draw(url: str, fields: dict[str, object], out: Path, timeout: float | None = None) -> None:
    """Write the pictures, and those on the way, beside `out`."""
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            MODEL,
            [request_input(name, value) for name, value in fields.items()],
            outputs=[grpc.InferRequestedOutput(name) for name in OUTPUTS],
            timeout=None if timeout is None else int(timeout * 1e6),
        )
        whole = False
        try:
            while not whole:
                result, error = answers.get()
                if error is not None or result is None:
                    raise error or RuntimeError("The stream has ended.")
                event = result.as_numpy("event")[0].decode()
                step = int(result.as_numpy("step")[0])
                for index, pixels in enumerate(result.as_numpy("image")):
                    mark = f"-{index}" if event == "final" else f"-{index}-step-{step}"
                    path = out.with_stem(f"{out.stem}{mark}")
                    Image.fromarray(pixels).save(path)
                    print(path)
                whole = event == "final"
            seeds, seconds = result.as_numpy("seeds"), result.as_numpy("seconds")
            print(f"seed {seeds[0]}, {step} steps, {sum(seconds):.2f} s", file=sys.stderr)
        finally:
            client.stop_stream(cancel_requests=not whole)


def main() -> int:
    """Draw what the command line says."""
    parser = argparse.ArgumentParser(description="Draw a picture on a Triton server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    parser.add_argument("--negative-prompt")
    parser.add_argument("--true-cfg-scale", type=float)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int, dest="num_inference_steps")
    parser.add_argument("--guidance", type=float, dest="guidance_scale")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--num-images", type=int, dest="n")
    parser.add_argument("--image", type=Path, help="a picture to start from")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--previews", type=int, dest="num_previews")
    parser.add_argument("--priority", choices=("high", "normal", "low"))
    parser.add_argument("--timeout", type=float, help="seconds")
    options = vars(parser.parse_args())
    url, out, timeout = options.pop("url"), options.pop("out"), options.pop("timeout")
    image = options.pop("image")
    fields = {name: value for name, value in options.items() if value is not None}
    if image is not None:
        fields["image_bytes"] = image.read_bytes()
    try:
        draw(url, fields, out, timeout)
    except InferenceServerException as error:
        print(f"Error: {error.message()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
