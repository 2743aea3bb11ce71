"""One contender of `gpu_step.py`, alone on the GPU.

    python gpu_step_worker.py CONTENDER FOLDER DOUBLE_BLOCKS SINGLE_BLOCKS SIZE...

`weights` makes a random transformer with PyTorch, and leaves in FOLDER its inputs, what it gives,
and engines with its weights. `native-PRECISION` runs one of these, without PyTorch. All others are
peers in PyTorch. Each prints JSON objects, one a line. An error is the distance to what PyTorch
eager gives in bfloat16, of which some thousandths are rounding.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.native.plan import Part

TEXT = 512
SECONDS = 2.5
"""Of steps that are timed."""


@dataclass(frozen=True)
class Task:
    """What is asked of a process."""

    folder: Path
    double_blocks: int
    single_blocks: int
    sizes: tuple[int, ...]

    def image(self, size: int) -> int:
        """Tokens of a picture."""
        return (size // 16) ** 2

    def file(self, name: str, size: int, kind: str) -> Path:
        return self.folder / f"{name}-{size}.{kind}"


class Gpu:
    """What the GPU says of itself, through NVML."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def used(self) -> int:
        """Bytes of GPU memory in use."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def clock(self) -> int:
        """MHz."""
        return int(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def reasons(self) -> int:
        """Why clocks are lower than they could be, as NVML's bits."""
        return int(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))


def measure(
    step: Callable[[], object],
    wait: Callable[[], object],
    used_before: int,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Times of steps, one after the other, as a host sees them."""
    gpu = Gpu()
    for _ in range(3):
        step()
    wait()
    started, clocks, reasons = time.monotonic(), [], 0
    times: list[float] = []
    joules = gpu.joules()
    while time.monotonic() - started < seconds or len(times) < 10:
        begun = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begun)
        clocks.append(gpu.clock())
        reasons |= gpu.reasons()
    joules = (gpu.joules() - joules) / len(times)
    times.sort()
    return {
        "step_ms": 1e3 * statistics.median(times),
        "p10_ms": 1e3 * times[len(times) // 10],
        "p90_ms": 1e3 * times[9 * len(times) // 10],
        "steps": len(times),
        "joules": joules,
        "clock_mhz": statistics.median(clocks),
        "throttled": reasons,
        "memory": gpu.used() - used_before,
    }


def relative_error(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def weights(task: Task) -> Iterator[dict[str, Any]]:
    """Make what the others take."""
    import gpu_peers
    import plan_files
    import torch

    model = None
    with torch.no_grad():
        for size in task.sizes:
            image = task.image(size)
            model, given = gpu_peers.flux(task.double_blocks, task.single_blocks, image, TEXT)
            np.savez(task.file("inputs", size, "npz"), **host_inputs(model, given))
            eager = model(**given, return_dict=False)[0][0].float().cpu().numpy()
            np.save(task.file("eager", size, "npy"), eager)
        assert model is not None
        for precision in plan_files.PRECISIONS:
            if (task.folder / f"{precision}.json").exists():
                begun = time.monotonic()
                _write_engine(task.folder, precision, model.state_dict())
                yield {"what": f"packed, {precision}", "seconds": time.monotonic() - begun}


def _write_engine(folder: Path, precision: str, state: Mapping[str, Any]) -> None:
    """An engine of a plan, packed on the GPU: `engines.native.pack` does it on any machine."""
    import plan_files
    import torch

    from engines.native.file import CUBIN, PLAN, read_engine
    from engines.native.pack import declare
    from fluxdeploy.bundle.tensorfile import read_header, write_sparse

    plan, metadata, cubins = plan_files.load_plan(folder, precision)
    path = folder / f"{precision}.engine"
    write_sparse(path, declare(plan, cubins), {**metadata, PLAN: plan.to_json()})
    places = read_header(path).tensors
    assert read_engine(path).plan.steps == plan.steps
    narrow = {p.source for each in plan.packed for p in each.parts if p.source.endswith(".scale")}
    with open(path, "r+b") as file, ThreadPoolExecutor(8) as pool:
        # A few at a time: they wait in memory.
        waiting: list[Future[int]] = []
        for each in plan.packed:
            packed = torch.cat([_part(state, part, each.kind, narrow) for part in each.parts])
            data = packed.reshape(-1).view(torch.uint8).cpu().numpy()
            waiting.append(pool.submit(os.pwrite, file.fileno(), data, places[each.name].offset))
            if len(waiting) > 16:
                waiting.pop(0).result()
        for name, cubin in cubins.items():
            os.pwrite(file.fileno(), cubin, places[f"{CUBIN}{name}"].offset)
        for each in waiting:
            each.result()


def _part(state: Mapping[str, Any], part: Part, kind: str, narrow: set[str]) -> Any:
    """A part of a packed tensor: a weight as it is or in 8 bits, its scale, or a vector."""
    import torch

    name = part.source.removesuffix(".scale")
    weight = state[name]
    if f"{name}.scale" not in narrow:
        return weight.to({"f32": torch.float32, "bf16": torch.bfloat16}[kind]) * part.factor
    scale = (weight.float().abs().amax(1) / 448).bfloat16().float()
    if part.source != name:
        return scale * part.factor
    return (weight.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


def host_inputs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a host gives the transformer in each step: `exporters.models.mmdit` has the order."""
    import torch
    from torch.nn import functional as F

    vector = F.silu(
        model.time_text_embed(
            given["timestep"] * 1000, given["guidance"] * 1000, given["pooled_projections"]
        )
    )
    rows = []
    for block in model.transformer_blocks:
        rows += [block.norm1.linear(vector), block.norm1_context.linear(vector)]
    rows += [block.norm.linear(vector) for block in model.single_transformer_blocks]
    scale, shift = model.norm_out.linear(vector).chunk(2, -1)
    rows += [shift, scale]
    width = model.inner_dim
    cos, sin = model.pos_embed(torch.cat((given["txt_ids"], given["img_ids"])))
    found = {
        "hidden_states": given["hidden_states"],
        "context": model.context_embedder(given["encoder_hidden_states"]),
        "modulation": torch.cat([row.reshape(1, -1, width) for row in rows], 1),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    return {name: x.float().cpu().numpy() for name, x in found.items()}


def native(task: Task, name: str) -> Iterator[dict[str, Any]]:
    """Steps of an engine, through its binding."""
    from engines.base import EngineOptions
    from engines.native.run import open_engine
    from engines.native.runtime import Native
    from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, TensorSpec

    before = Gpu().used()
    given = dict(np.load(task.file("inputs", task.sizes[0], "npz")))
    shapes = {
        "hidden_states": ("B", "L", given["hidden_states"].shape[-1]),
        "context": ("B", "S", given["context"].shape[-1]),
        "modulation": ("B", *given["modulation"].shape[1:]),
        "rope_cos": ("T", given["rope_cos"].shape[-1]),
        "rope_sin": ("T", given["rope_sin"].shape[-1]),
    }
    precision = name.removeprefix("native-")
    record = ComponentRecord(
        key="",
        precision=precision,
        compute="bf16",
        inputs=tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items()),
        outputs=(TensorSpec("velocity", "float32", shapes["hidden_states"]),),
        files=(),
        engines=(),
        golden=None,
    )
    path = task.folder / f"{precision}.engine"
    built = EngineRecord("native", Native().version(), "sm90", path.name, {})
    begun = time.monotonic()
    with open_engine("transformer", record, built, path, EngineOptions()) as engine:
        opened = time.monotonic() - begun
        for size in task.sizes:
            given = dict(np.load(task.file("inputs", size, "npz")))
            changing = {name: given.pop(name) for name in ("hidden_states", "modulation")}
            binding = engine.bind(given)
            begun = time.monotonic()
            velocity = binding.run(changing)["velocity"][0].copy()
            found = {
                "size": size,
                "what": f"native, {precision}",
                "open_s": opened,
                "first_ms": 1e3 * (time.monotonic() - begun),
                "error": relative_error(velocity, np.load(task.file("eager", size, "npy"))),
                "repeat": relative_error(binding.run(changing)["velocity"][0], velocity),
            }
            yield found | measure(partial(binding.run, changing), lambda: None, before)
            yield {"size": size, "what": f"native, {precision}: kernels", **_kernels(engine, size)}


def _kernels(engine: Any, size: int) -> dict[str, Any]:
    """Milliseconds of a step by what its kernels do, each alone between two events."""
    from cuda.bindings import runtime

    from engines.native.launches import Sizes

    sizes = Sizes(TEXT, (size // 16) ** 2)
    binding = next(iter(engine._bindings))
    symbols = {"B": 1, "S": sizes.text, "L": sizes.image, "T": sizes.all}
    calls = engine.calls(sizes, binding._inputs_of(0, symbols))
    events = [runtime.cudaEventCreate()[1] for _ in range(len(calls) + 1)]
    for _ in range(2):
        runtime.cudaEventRecord(events[0], engine.stream)
        for call, event in zip(calls, events[1:], strict=True):
            engine.queue([call], sizes.all)
            runtime.cudaEventRecord(event, engine.stream)
        engine.cuda.synchronize(engine.stream)
    found: dict[str, list[float]] = {}
    for index, call in enumerate(calls):
        elapsed = runtime.cudaEventElapsedTime(events[index], events[index + 1])[1]
        found.setdefault(_label(call), []).append(elapsed)
    return {
        "kernels": {
            label: {"count": len(times), "ms": sum(times), "median_ms": statistics.median(times)}
            for label, times in found.items()
        }
    }


def _label(call: Any) -> str:
    kernel = getattr(call, "kernel", None)
    if kernel is None:
        return "attention"
    if kernel.function not in ("linear", "specialized"):
        return str(kernel.function)
    weight = call.given["weight"]
    return f"linear {call.given['rows'][1]}x{weight.columns}x{weight.rows}"


def peer(task: Task, name: str) -> Iterator[dict[str, Any]]:
    """Steps of diffusers' transformer in PyTorch."""
    import gpu_peers
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = Gpu().used()
    prepare = name.removesuffix("-cudnn")
    attention = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if prepare != name else nullcontext()
    with torch.no_grad(), attention:
        for size in task.sizes:
            image = task.image(size)
            begun = time.monotonic()
            model, given = gpu_peers.flux(task.double_blocks, task.single_blocks, image, TEXT)
            gpu_peers.PREPARE[prepare](model)

            def step(model: Any = model, given: Any = given) -> Any:
                return model(**given, return_dict=False)[0]

            velocity = step()[0].float().cpu().numpy()
            found = {
                "size": size,
                "what": name,
                "first_ms": 1e3 * (time.monotonic() - begun),
                "error": relative_error(velocity, np.load(task.file("eager", size, "npy"))),
            }
            torch.cuda.empty_cache()
            yield found | measure(step, torch.cuda.synchronize, before)


def main(contender: str, folder: str, double: str, single: str, *sizes: str) -> None:
    """Run a contender and print what it finds."""
    task = Task(Path(folder), int(double), int(single), tuple(int(size) for size in sizes))
    if contender == "weights":
        results = weights(task)
    elif contender.startswith("native-"):
        results = native(task, contender)
    else:
        results = peer(task, contender)
    for found in results:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
