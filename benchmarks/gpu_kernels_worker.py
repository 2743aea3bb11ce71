"""Measures one stage of `gpu_kernels.py` on this machine's GPU.

    python gpu_kernels_worker.py STAGE

Prints a JSON object a line, each as soon as it is known. What fails becomes a line that says so,
and the others go on; what takes the process down is told by the one that started it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "PRODUCTS",
    "ROWS",
    "STAGES",
    "Result",
    "attention_operations",
    "one_line",
    "product_operations",
    "relative_error",
    "step_operations",
]

WIDTH, HEAD_DIM, MLP, CHANNELS = 3072, 128, 12288, 64
"""FLUX.1's."""

TEXT = 512
ROWS = (4096 + TEXT, 1024 + TEXT)
"""Tokens of a picture of 1024x1024 and of 512x512, with the text's."""

PRODUCTS = (
    (WIDTH, 3 * WIDTH + MLP, "gelu"),
    (WIDTH, 3 * WIDTH, "bias"),
    (WIDTH, WIDTH, "residual"),
    (WIDTH, MLP, "gelu"),
    (MLP, WIDTH, "residual"),
    (WIDTH + MLP, WIDTH, "residual"),
)
"""Of the blocks' linears: channels in, channels out, and what follows (`triton_linear`)."""

DOUBLE_BLOCKS, SINGLE_BLOCKS = 5, 10
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
LARGEST = 448.0
PACKAGES = ("torch", "triton", "diffusers", "torchao", "nvidia-cudnn-frontend")


@dataclass(frozen=True)
class Result:
    """A measurement, or why there is none.

    what, variant: what ran, and in which of several ways. milliseconds: the median of a call.
    operations: of a call. error: of its result, relative to a reference's norm.
    """

    what: str
    shape: str = ""
    variant: str = ""
    milliseconds: float | None = None
    operations: int | None = None
    error: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Contender:
    """What is timed, and what it has computed after that."""

    run: Callable[[], object]
    result: Callable[[], Tensor]


Build = Callable[[], Contender]


def product_operations(rows: int, inner: int, columns: int) -> int:
    """A multiplication and its addition are two."""
    return 2 * rows * inner * columns


def attention_operations(tokens: int, width: int) -> int:
    """Of both products."""
    return 4 * tokens * tokens * width


def step_operations(double_blocks: int, single_blocks: int, image: int, text: int) -> int:
    """Of a step of a transformer of FLUX.1's width, without those of its conditioning."""
    tokens, blocks = image + text, double_blocks + single_blocks
    linears = product_operations(tokens, WIDTH, 4 * WIDTH + 2 * MLP)
    ends = product_operations(image, WIDTH, 2 * CHANNELS)
    return blocks * (linears + attention_operations(tokens, WIDTH)) + ends


def relative_error(found: Tensor, expected: Tensor) -> float | None:
    """|found - expected| / |expected|; None where a number is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else None


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words}"[:200]


def _elapsed(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call, of several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def _measure(
    what: str,
    shape: str,
    operations: int,
    contenders: Mapping[str, Build],
    expected: Tensor | None,
    seconds: float,
    rounds: int = 5,
    worst: float = 0.2,
) -> Iterator[Result]:
    """Time contenders in turns, since clocks fall under load; `seconds` for each of them.

    `expected` are the first rows of what each has to compute. One whose error is larger than
    `worst` computes something else, and is not timed.
    """
    ready: dict[str, tuple[Contender, int, float | None]] = {}
    for variant, build in contenders.items():
        try:
            contender = build()
            contender.run()
            error = None
            if expected is not None:
                error = relative_error(contender.result()[: len(expected)], expected)
                if error is None or error > worst:
                    raise ArithmeticError(f"its error is {error or 'not finite'}")
            once = _elapsed(contender.run, 3)
            repeats = max(1, round(1e3 * seconds / rounds / once))
            ready[variant] = contender, repeats, error
        except Exception as failure:  # noqa: BLE001 - a result too
            yield Result(what, shape, variant, failure=one_line(failure))
    times: dict[str, list[float]] = {variant: [] for variant in ready}
    for _ in range(rounds):
        for variant, (contender, repeats, _error) in ready.items():
            times[variant].append(_elapsed(contender.run, repeats))
    for variant, (_contender, _repeats, error) in ready.items():
        median = statistics.median(times[variant])
        yield Result(what, shape, variant, median, operations, error)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def _in_8_bits(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 numbers and their scale, float32: one, or one a row."""
    wide = x.float()
    largest = wide.abs().max() if axis is None else wide.abs().amax(axis, keepdim=True)
    scale = largest / LARGEST
    return (wide / scale).to(E4M3), scale


def machine() -> Iterator[dict[str, Any]]:
    """What it all ran on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    yield {
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "idle": _gpu_state(),
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": sys.version.split()[0],
            "packages": found,
        }
    }


def _gpu_state() -> dict[str, str]:
    query = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as failure:
        return {"failure": one_line(failure)}
    return dict(zip(query.split(","), told.splitlines()[0].split(", "), strict=False))


def peaks() -> Iterator[Any]:
    """The rates to hold the others against: large products, and a copy, whose bytes count."""
    side = 8192
    a, b = _random(side, side), _random(side, side)
    (a8, s), (b8, t) = _in_8_bits(a), _in_8_bits(b)
    work, shape = product_operations(side, side, side), f"{side}x{side}x{side}"

    def bf16() -> Tensor:
        return a @ b.t()

    def fp8() -> Tensor:
        return _scaled(a8, b8, s, t)

    for what, run in (("bf16", bf16), ("fp8", fp8)):
        contender = Contender(run, run)
        yield from _measure(what, shape, work, {"": lambda c=contender: c}, None, 1.0)
    yield {"under_load": _gpu_state()}
    source = torch.randint(255, (1 << 30,), device="cuda", dtype=torch.uint8)
    copied = torch.empty_like(source)
    copy = Contender(lambda: copied.copy_(source), lambda: copied)
    yield from _measure("copy", "1 GiB", 2 << 30, {"": lambda: copy}, None, 0.5)


def products() -> Iterator[Result]:
    """The blocks' linears through cuBLASLt and cuDNN: y = x Wᵀ + bias, bfloat16 out."""
    for rows, (inner, columns, _) in itertools.product(ROWS, PRODUCTS):
        x, weight, bias = _random(rows, inner), _random(columns, inner), _random(columns)
        weight *= inner**-0.5
        expected = F.linear(x[:128].float(), weight.float(), bias.float())
        work, shape = product_operations(rows, inner, columns), f"{rows}x{inner}x{columns}"
        for name, build in _products(x, weight, bias).items():
            yield from _measure(name, shape, work, {"": build}, expected, 0.15)


def _products(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Build]:
    (x8, s), (w8, t) = _in_8_bits(x), _in_8_bits(weight)
    (x8_rows, s_rows), (w8_rows, t_rows) = _in_8_bits(x, 1), _in_8_bits(weight, 1)
    ones = torch.ones(len(weight), device="cuda")

    def bf16() -> Tensor:
        return F.linear(x, weight, bias)

    def by_tensor() -> Tensor:
        return _scaled(x8, w8, s, t, bias)

    def by_row() -> Tensor:
        return _scaled(x8_rows, w8_rows, s_rows, t_rows.t(), bias)

    def cudnn(a: Tensor, b: Tensor, scale: Tensor) -> Contender:
        import cudnn_graphs

        return Contender(*cudnn_graphs.linear(a, b, scale, bias.float()))

    return {
        "bf16": lambda: Contender(bf16, bf16),
        "fp8, a scale a tensor": lambda: Contender(by_tensor, by_tensor),
        "fp8, a scale a row": lambda: Contender(by_row, by_row),
        "cuDNN, bf16": lambda: cudnn(x, weight, ones),
        "cuDNN, fp8": lambda: cudnn(x8, w8_rows, (s * t_rows).reshape(-1)),
    }


def _scaled(x: Tensor, weight: Tensor, s: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch._scaled_mm(
        x, weight.t(), s, t, bias=bias, out_dtype=BF16, use_fast_accum=True
    )
    return y


def linears() -> Iterator[Result]:
    """The blocks' linears with what follows them, as kernels of our own in Triton."""
    for kind, rows, shape in itertools.product(("fp8", "bf16"), ROWS, PRODUCTS):
        inner, columns, epilogue = shape
        builds, expected = _triton_linears(kind, rows, inner, columns, epilogue)
        work, name = product_operations(rows, inner, columns), f"{rows}x{inner}x{columns}"
        what = f"Triton, {kind}, {epilogue}"
        yield from _measure(what, name, work, builds, expected, 0.06, rounds=3)


def _triton_linears(
    kind: str, rows: int, inner: int, columns: int, epilogue: str
) -> tuple[dict[str, Build], Tensor]:
    """Contenders by their configuration, and the first rows of what they have to compute."""
    from triton_linear import CONFIGS, Linear

    x, weight, residual = _random(rows, inner), _random(columns, inner), _random(rows, columns)
    scale, bias, gate = (torch.rand(columns, device="cuda") for _ in range(3))
    if kind == "fp8":
        x, weight = x.to(E4M3), weight.to(E4M3)
    scale *= inner**-0.5
    y = F.linear(x[:128].float(), weight.float()) * scale + bias
    expected = {
        "bias": y,
        "gelu": F.gelu(y, approximate="tanh"),
        "residual": residual[:128].float() + gate * y,
    }[epilogue]
    programs = torch.cuda.get_device_properties(0).multi_processor_count

    def build(config: Any) -> Contender:
        out = torch.empty(rows, columns, device="cuda", dtype=BF16)
        out = out.fill_(float("nan")).to(x.dtype if epilogue == "gelu" else BF16)
        run = Linear(x, weight, out, (scale, bias, gate), residual, epilogue, config, programs)
        return Contender(run, lambda: out)

    return {str(config): partial(build, config) for config in CONFIGS}, expected


def attention() -> Iterator[Result]:
    """Attention of one picture; errors against float64 over two heads."""
    for tokens in ROWS:
        joint = _random(tokens, 3, WIDTH // HEAD_DIM, HEAD_DIM)
        q, k, v = (x.double() for x in joint[:, :, :2].permute(1, 2, 0, 3))
        expected = torch.softmax(q @ k.mT * HEAD_DIM**-0.5, dim=-1) @ v
        work = attention_operations(tokens, WIDTH)
        for name, build in _attentions(joint).items():
            yield from _measure(name, f"{tokens} tokens", work, {"": build}, expected, 0.4)


def _attentions(joint: Tensor) -> dict[str, Build]:
    """Of Q, K and V [tokens,3,heads,head_dim]; results are [heads,tokens,head_dim]."""
    q, k, v = joint.permute(1, 2, 0, 3)[:, None]

    def by_torch(backend: SDPBackend) -> Contender:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return Contender(run, lambda: run()[0])

    def by_cudnn() -> Contender:
        import cudnn_graphs

        return Contender(*cudnn_graphs.attention(joint))

    def by_cudnn_in_8_bits() -> Contender:
        import cudnn_graphs

        return Contender(*cudnn_graphs.attention_in_8_bits(*_in_8_bits(joint)))

    return {
        "torch, FlashAttention": lambda: by_torch(SDPBackend.FLASH_ATTENTION),
        "torch, cuDNN": lambda: by_torch(SDPBackend.CUDNN_ATTENTION),
        "cuDNN, bf16": by_cudnn,
        "cuDNN, fp8": by_cudnn_in_8_bits,
    }


def _peer(name: str, prepare: str, backend: SDPBackend | None) -> Iterator[Result]:
    """A step of diffusers' transformer; its error is that against eager."""
    import gpu_peers

    image = ROWS[0] - TEXT
    model, inputs = gpu_peers.flux(DOUBLE_BLOCKS, SINGLE_BLOCKS, image, TEXT)

    def run() -> Tensor:
        velocity: Tensor = model(**inputs, return_dict=False)[0]
        return velocity[0]

    with torch.no_grad():
        expected = run()
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            gpu_peers.PREPARE[prepare](model)
            work = step_operations(DOUBLE_BLOCKS, SINGLE_BLOCKS, image, TEXT)
            shape = f"{DOUBLE_BLOCKS}+{SINGLE_BLOCKS} blocks, {ROWS[0]} tokens"
            builds: dict[str, Build] = {"": lambda: Contender(run, run)}
            yield from _measure(name, shape, work, builds, expected, 3.0, worst=0.5)


STAGES: Mapping[str, Callable[[], Iterator[Any]]] = {
    "machine": machine,
    "peaks": peaks,
    "products": products,
    "attention": attention,
    "linears": linears,
    "eager": partial(_peer, "eager", "eager", None),
    "compile": partial(_peer, "compile", "compile", None),
    "compile-cudnn": partial(
        _peer, "compile, cuDNN attention", "compile", SDPBackend.CUDNN_ATTENTION
    ),
    "compile-fp8": partial(
        _peer, "compile, FP8, cuDNN attention", "compile-fp8", SDPBackend.CUDNN_ATTENTION
    ),
}


def main(stage: str) -> None:
    """Run a stage and print what it finds."""

    def tell(found: Any) -> None:
        print(json.dumps(asdict(found) if isinstance(found, Result) else found), flush=True)

    torch.manual_seed(1)
    try:
        for found in STAGES[stage]():
            tell(found)
    except Exception as failure:  # noqa: BLE001 - a result too
        tell(Result(stage, failure=one_line(failure)))


if __name__ == "__main__":
    main(*sys.argv[1:])
