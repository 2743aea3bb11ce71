"""One contender of `gpu_step.py`, alone on the GPU.

    python gpu_step_worker.py CONTENDER FOLDER DOUBLE_BLOCKS SINGLE_BLOCKS SIZE

`weights` makes a random transformer with PyTorch, and leaves in FOLDER its inputs, what it gives in
bfloat16 and in float32, and engines with its weights. `native-PRECISION` runs one of these, without
PyTorch. All others are peers in PyTorch. Each prints JSON objects, one a line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.native.plan import Plan

TEXT = 512
SECONDS = 2.5
"""Of steps that are timed."""


@dataclass(frozen=True)
class Task:
    """What is asked of a process."""

    folder: Path
    double_blocks: int
    single_blocks: int
    size: int

    @property
    def image(self) -> int:
        return (self.size // 16) ** 2

    def file(self, name: str) -> Path:
        return self.folder / f"{name}-{self.size}"


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
    step: Callable[[], object], wait: Callable[[], object], used_before: int
) -> dict[str, Any]:
    """Times of steps in seconds, one after the other, as a host sees them."""
    gpu = Gpu()
    for _ in range(3):
        step()
    wait()
    started, clocks = time.monotonic(), []
    times: list[float] = []
    joules = gpu.joules()
    while time.monotonic() - started < SECONDS or len(times) < 10:
        begun = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begun)
        clocks.append(gpu.clock())
    joules = (gpu.joules() - joules) / len(times)
    times.sort()
    return {
        "step_ms": 1e3 * statistics.median(times),
        "p10_ms": 1e3 * times[len(times) // 10],
        "p90_ms": 1e3 * times[9 * len(times) // 10],
        "steps": len(times),
        "joules": joules,
        "clock_mhz": statistics.median(clocks),
        "throttled": gpu.reasons(),
        "memory": gpu.used() - used_before,
    }


def relative_error(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def weights(task: Task) -> dict[str, Any]:
    """Make what the others take."""
    import gpu_peers
    import plan_files
    import torch

    from engines.native.pack import write_engine
    from fluxdeploy.progress import Progress

    model, given = gpu_peers.flux(task.double_blocks, task.single_blocks, task.image, TEXT)
    seconds = {}
    with torch.no_grad():
        np.savez(_npz(task.file("inputs")), **_inputs(model, given))
        eager = model(**given, return_dict=False)[0][0].float().cpu().numpy()
        np.save(_npy(task.file("eager")), eager)
        for precision in plan_files.PRECISIONS:
            path, begun = task.folder / f"{precision}.engine", time.monotonic()
            if (task.folder / f"{precision}.json").exists() and not path.exists():
                plan, metadata, cubins = plan_files.load_plan(task.folder, precision)
                model_weights: Any = _Weights(plan, model.state_dict())
                write_engine(path, plan, model_weights, cubins, metadata, Progress(quiet=True))
                seconds[precision] = time.monotonic() - begun
        model.float()
        given = {name: x.float() for name, x in given.items()}
        true = model(**given, return_dict=False)[0][0].cpu().numpy()
        np.save(_npy(task.file("true")), true)
    return {"what": "weights", "error": relative_error(eager, true), "packed_s": seconds}


def _inputs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
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


class _Weights:
    """A model's weights as the initializers of a plan's graph, in 8 bits where that has them."""

    def __init__(self, plan: Plan, state: Mapping[str, Any]) -> None:
        self.graph = self
        self.initializers = self
        self._state = state
        parts = [part for packed in plan.packed for part in packed.parts]
        self._narrow = {
            part.source.removesuffix(".scale") for part in parts if part.source.endswith(".scale")
        }

    def __getitem__(self, name: str) -> _Weight:
        weight = name.removesuffix(".scale")
        narrow = weight in self._narrow
        return _Weight(self._state[weight], narrow, name.endswith(".scale"))


@dataclass(frozen=True)
class _Weight:
    """One of them: a weight [N,K] as it is; or in 8 bits, [K,N] as graphs have it; or its scale."""

    tensor: Any
    narrow: bool
    is_scale: bool

    @property
    def const_value(self) -> _Weight:
        return self

    @property
    def dtype(self) -> Any:
        from onnx_ir import DataType

        return DataType.FLOAT8E4M3FN if self.narrow and not self.is_scale else DataType.BFLOAT16

    def numpy(self) -> Any:
        import torch

        if not self.narrow:
            return self.tensor.contiguous().view(torch.int16).cpu().numpy()
        scale = (self.tensor.float().abs().amax(1) / 448).bfloat16()
        if self.is_scale:
            return scale.view(torch.int16).cpu().numpy()
        narrow = (self.tensor.float() / scale.float()[:, None]).clamp(-448, 448)
        return narrow.to(torch.float8_e4m3fn).view(torch.uint8).cpu().numpy().T


def native(task: Task, precision: str) -> dict[str, Any]:
    """A step of an engine, through its binding."""
    from engines.base import EngineOptions
    from engines.native.run import open_engine
    from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, TensorSpec

    before = Gpu().used()
    given = dict(np.load(_npz(task.file("inputs"))))
    symbols = {
        "hidden_states": ("B", "L", given["hidden_states"].shape[-1]),
        "context": ("B", "S", given["context"].shape[-1]),
        "modulation": ("B", *given["modulation"].shape[1:]),
        "rope_cos": ("T", given["rope_cos"].shape[-1]),
        "rope_sin": ("T", given["rope_sin"].shape[-1]),
    }
    record = ComponentRecord(
        key="",
        precision=precision,
        compute="bf16",
        inputs=tuple(TensorSpec(name, "float32", shape) for name, shape in symbols.items()),
        outputs=(TensorSpec("velocity", "float32", symbols["hidden_states"]),),
        files=(),
        engines=(),
        golden=None,
    )
    path = task.folder / f"{precision}.engine"
    built = EngineRecord("native", "1", "sm90", path.name, {})
    begun = time.monotonic()
    with ExitStack() as stack:
        engine = stack.enter_context(
            open_engine("transformer", record, built, path, EngineOptions())
        )
        opened = time.monotonic() - begun
        changing = {name: given.pop(name) for name in ("hidden_states", "modulation")}
        binding = engine.bind(given)
        begun = time.monotonic()
        velocity = binding.run(changing)["velocity"][0]
        first = time.monotonic() - begun
        again = binding.run(changing)["velocity"][0]
        found = {
            "what": f"native, {precision}",
            "open_s": opened,
            "first_ms": 1e3 * first,
            "error": relative_error(velocity, np.load(_npy(task.file("true")))),
            "vs_eager": relative_error(velocity, np.load(_npy(task.file("eager")))),
            "repeat": relative_error(again, velocity),
        }
        found |= measure(lambda: binding.run(changing), lambda: None, before)
        return found


def peer(task: Task, name: str) -> dict[str, Any]:
    """A step of diffusers' transformer in PyTorch."""
    import gpu_peers
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = Gpu().used()
    model, given = gpu_peers.flux(task.double_blocks, task.single_blocks, task.image, TEXT)
    cudnn = name.endswith("-cudnn")
    prepare = name.removesuffix("-cudnn")
    begun = time.monotonic()
    with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext():
        gpu_peers.PREPARE[prepare](model)

        def step() -> Any:
            return model(**given, return_dict=False)[0]

        velocity = step()[0].float().cpu().numpy()
        found = {
            "what": name,
            "first_ms": 1e3 * (time.monotonic() - begun),
            "error": relative_error(velocity, np.load(_npy(task.file("true")))),
        }
        torch.cuda.empty_cache()
        return found | measure(step, torch.cuda.synchronize, before)


def _npy(path: Path) -> Path:
    return path.with_name(path.name + ".npy")


def _npz(path: Path) -> Path:
    return path.with_name(path.name + ".npz")


def main(contender: str, folder: str, *numbers: str) -> None:
    """Run a contender and print what it finds."""
    task = Task(Path(folder), *(int(n) for n in numbers))
    if contender == "weights":
        found = weights(task)
    elif contender.startswith("native-"):
        found = native(task, contender.removeprefix("native-"))
    else:
        found = peer(task, contender)
    print(json.dumps({"size": task.size} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
