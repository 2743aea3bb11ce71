"""What a step of the transformer has to do, and how fast the machine could do it at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from exporters.checkpoint.config import TransformerConfig
from fluxdeploy.bench.report.record import BenchReport

__all__ = [
    "Peaks",
    "StepWork",
    "count_step",
    "least_seconds",
    "measure_peaks",
    "roofline_shares",
]

_TYPES = {
    "fp32": ("fp32", "fp32", 4.0),
    "bf16": ("bf16", "bf16", 2.0),
    "fp16": ("fp16", "fp16", 2.0),
    "fp8": ("fp8", "fp8", 1.0),
    "fp8-linears": ("fp8", "bf16", 1.0),
    "fp8-weights": ("bf16", "bf16", 1.0),
}
"""By precision: the type of the linears' products, of attention's, and a weight's bytes."""


@dataclass(frozen=True)
class StepWork:
    """Floating-point operations of the linears and of attention's products, and linear weights.

    A multiplication and its addition are two operations. The conditioner's work is not in it.
    """

    linears: int
    attention: int
    weights: int


@dataclass(frozen=True)
class Peaks:
    """Measured on this machine: operations a second by type, and bytes read a second."""

    operations: Mapping[str, float]
    bytes: float


def count_step(config: TransformerConfig, image_tokens: int, text_tokens: int) -> StepWork:
    """The work of one step for one picture.

    A token of a block meets 4 d² + 2 d m weights (Q, K, V and output, MLP in and out), be it in a
    single block or in its stream of a double block. Both products of attention take 2 N² d.
    """
    d, m, tokens = config.width, config.mlp_width, image_tokens + text_tokens
    blocks = config.double_blocks + config.single_blocks
    stream = 4 * d * d + 2 * d * m
    ends = d * (config.in_channels + config.out_channels)
    return StepWork(
        linears=2 * (blocks * tokens * stream + image_tokens * ends),
        attention=4 * blocks * tokens * tokens * d,
        weights=(2 * config.double_blocks + config.single_blocks) * stream + ends,
    )


def least_seconds(work: StepWork, precision: str, peaks: Peaks) -> float | None:
    """The least time of a step in `precision`; None where a type's peak is not known.

    Products at their peak, or each weight read once, whatever takes longer.
    """
    if precision not in _TYPES:
        return None
    linear, attention, size = _TYPES[precision]
    rates = peaks.operations
    if linear not in rates or attention not in rates:
        return None
    products = work.linears / rates[linear] + work.attention / rates[attention]
    return max(products, work.weights * size / peaks.bytes)


def roofline_shares(report: BenchReport, work: StepWork, peaks: Peaks) -> dict[str, float]:
    """The least time of a step over the median one, for those whose types have a known peak."""
    shares = {}
    for each in report.contenders:
        least = least_seconds(work, each.precision, peaks)
        if least is not None:
            shares[each.name] = least / each.timings["step"].p50
    return shares


def measure_peaks(device: str) -> Peaks:
    """The rate of a large product in each type that PyTorch has here, and that of a large copy.

    On CPUs, ONNX Runtime's product in float32 counts where it is the faster one.
    """
    side = 8192 if device == "cuda" else 2048
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device == "cpu" and name == "fp16":
            continue  # PyTorch emulates it on most processors
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * side**3 / _median_seconds(lambda a=a, b=b: a @ b, device)
    if device == "cpu":
        rates["fp32"] = max(rates["fp32"], 2 * side**3 / _median_seconds(_product(side), device))
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one, wide = torch.ones((), device=device), torch.bfloat16

        def product() -> object:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=wide)

        rates["fp8"] = 2 * side**3 / _median_seconds(product, device)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peaks(rates, 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device))


def _product(side: int) -> Callable[[], object]:
    """A product with a constant matrix in ONNX Runtime, which lays it out for that beforehand."""
    import onnxruntime  # not above: the package that switches its telemetry off comes after it

    ones = np.ones((side, side), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "ones"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [side, side])],
        [onnx.numpy_helper.from_array(ones, "ones")],
    )
    opsets = [helper.make_opsetid("", 22)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda: session.run(None, {"x": ones})


def _median_seconds(run: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Seconds of the median run, after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
