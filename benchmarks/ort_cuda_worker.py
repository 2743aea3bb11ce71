"""One contender of `ort_cuda_step.py`, alone on the GPU.

    python ort_cuda_worker.py CONTENDER FOLDER DOUBLE_BLOCKS SINGLE_BLOCKS SIZE...

`eager` makes a random transformer with PyTorch, leaves its weights, its inputs and what it gives in
FOLDER, and is timed; all others are graphs of `ort_cuda_graphs.py`, which run without PyTorch. Each
prints JSON objects, one a line. An error is the distance to what PyTorch eager gives in bfloat16,
of which some thousandths are rounding.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_step_worker import TEXT, Gpu, Task, host_inputs, measure, relative_error
from ort_cuda_files import LAYOUT, WEIGHTS

SECONDS = 1.5
"""Of steps that are timed."""

_SAYS = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"
"""With 1, ONNX Runtime prints which kernel computes each attention."""


def eager(task: Task) -> Iterator[dict[str, Any]]:
    """PyTorch as it is, and what the others take."""
    import gpu_peers
    import torch

    before, model = Gpu().used(), None
    with torch.no_grad():
        for size in task.sizes:
            model, given = gpu_peers.flux(
                task.double_blocks, task.single_blocks, task.image(size), TEXT
            )
            np.savez(task.file("inputs", size, "npz"), **host_inputs(model, given))

            def step(model: Any = model, given: Any = given) -> Any:
                return model(**given, return_dict=False)[0]

            velocity = step()[0].float().cpu().numpy()
            np.save(task.file("eager", size, "npy"), velocity)
            found = {"size": size, "what": "eager", "error": 0.0}
            yield found | measure(step, torch.cuda.synchronize, before, SECONDS)
        assert model is not None
        begun = time.monotonic()
        _write_weights(task.folder, model.state_dict())
        yield {"what": "weights", "seconds": time.monotonic() - begun}


def _write_weights(folder: Path, state: dict[str, Any]) -> None:
    import torch

    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    with open(folder / WEIGHTS, "wb") as file:
        for entry in layout.values():
            whole = state[entry["source"]]
            data = (whole.t().contiguous() if entry["turned"] else whole).reshape(-1)
            file.seek(entry["offset"])
            file.write(data.view(torch.uint8).cpu().numpy())


def graph(task: Task, name: str) -> Iterator[dict[str, Any]]:
    """Steps of a graph, and at the smallest size as one CUDA graph too."""
    before = Gpu().used()
    begun = time.monotonic()
    session = _open(task.folder / f"{name}.onnx")
    opened = {"open_s": time.monotonic() - begun}
    for size in task.sizes:
        yield {"size": size, "what": name} | opened | _timed(task, size, session, before)
    del session
    os.environ[_SAYS] = "1"
    session = _open(task.folder / f"{name}.onnx", enable_cuda_graph="1")
    with _said() as said:
        size = min(task.sizes)
        found = _timed(task, size, session, before)
    kernels = sorted(set(re.findall(r"SdpaKernel=(\w+)", "\n".join(said))))
    yield {"size": size, "what": f"{name}, CUDA graph", "attention": kernels} | found


def _open(path: Path, **choices: str) -> Any:
    import onnxruntime

    onnxruntime.preload_dlls(msvc=False)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    provider = ("CUDAExecutionProvider", choices)
    session = onnxruntime.InferenceSession(str(path), settings, providers=[provider])
    if provider[0] not in session.get_providers():
        raise SystemExit("ONNX Runtime could not start its CUDA provider")
    return session


def _timed(task: Task, size: int, session: Any, before: int) -> dict[str, Any]:
    """Inputs and outputs stay on the GPU."""
    import onnxruntime

    binding = session.io_binding()
    inputs = dict(np.load(task.file("inputs", size, "npz")))
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x, "cuda", 0) for n, x in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    shape = inputs["hidden_states"].shape
    velocity = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
    binding.bind_ortvalue_output("velocity", velocity)
    step: Callable[[], None] = partial(session.run_with_iobinding, binding)
    begun = time.monotonic()
    step()
    first = {"first_ms": 1e3 * (time.monotonic() - begun)}
    # A CUDA graph is captured in the first runs: what is compared is a later one.
    step()
    step()
    found = first | _errors(velocity.numpy()[0], np.load(task.file("eager", size, "npy")))
    return found | measure(step, lambda: None, before, SECONDS)


def _errors(found: Any, expected: Any) -> dict[str, float]:
    """How far a graph is from PyTorch, besides as a bundle's gate has it."""
    found, expected = (np.asarray(x, np.float64).ravel() for x in (found, expected))
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return {
        "error": relative_error(found, expected),
        "max_error": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "cosine": float(found @ expected / norms),
    }


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """The lines that anything in this process prints."""
    lines: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            lines += [line.strip() for line in file]


def main(contender: str, folder: str, double: str, single: str, *sizes: str) -> None:
    """Run a contender and print what it finds."""
    task = Task(Path(folder), int(double), int(single), tuple(int(size) for size in sizes))
    for found in eager(task) if contender == "eager" else graph(task, contender):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
