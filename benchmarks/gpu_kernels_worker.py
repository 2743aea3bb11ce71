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
    (WIDTH, 3 * WIDTH + MLP, "split"),
    (WIDTH, 3 * WIDTH, "plain"),
    (WIDTH, WIDTH, "residual"),
    (WIDTH, MLP, "gelu"),
    (MLP, WIDTH, "residual"),
    (WIDTH + MLP, WIDTH, "residual"),
)
"""Of the blocks' linears: channels in, channels out, and what follows (`engines.native.plan`)."""

DOUBLE_BLOCKS, SINGLE_BLOCKS = 5, 10
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
LARGEST = 448.0
PACKAGES = ("torch", "triton", "diffusers", "nvidia-cudnn-frontend")


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


def linears(specialized: bool) -> Iterator[Result]:
    """The blocks' linears with what follows them, as kernels of our own."""
    for kind, rows, shape in itertools.product(("fp8", "bf16"), ROWS, PRODUCTS):
        inner, columns, epilogue = shape
        turns = specialized and epilogue in ("plain", "split")
        for turned in (False, True) if turns else (False,):
            builds, expected = _linears(kind, rows, shape, turned, specialized)
            work, name = product_operations(rows, inner, columns), f"{rows}x{inner}x{columns}"
            what = f"native, {kind}, {epilogue}" + (", RoPE" if turned else "")
            yield from _measure(what, name, work, builds, expected, 0.04, rounds=3)


def _linears(
    kind: str, rows: int, shape: tuple[int, int, str], turned: bool, specialized: bool
) -> tuple[dict[str, Build], Tensor]:
    """Contenders by their tile, and what they have to compute: some rows of text, and some not."""
    import native_kernels

    inner, columns, epilogue = shape
    groups = 1 if epilogue == "split" or inner > 4 * columns else 2
    x, weight = _random(rows, inner), _random(groups * columns, inner)
    scale, bias = (torch.rand(groups * columns, device="cuda") for _ in range(2))
    gate = torch.rand(columns, device="cuda") * 1e-2
    if kind == "fp8":
        x, weight = x.to(E4M3), weight.to(E4M3)
        scale *= inner**-0.5
    else:
        weight *= inner**-0.5
        scale.fill_(1)
    start = _random(rows, columns) if epilogue == "residual" else None
    plain = {"split": 3 * WIDTH, "gelu": 0}.get(epilogue, columns)
    turn = _turn(rows) if turned else None
    if turn is not None and groups == 1:
        turn.norms[2:] = turn.norms[:2]  # single blocks have one weight for both streams

    def right(piece: slice, group: slice) -> Tensor:
        y = F.linear(x[piece].float(), weight[group].float()) * scale[group] + bias[group]
        if start is not None:
            return start[piece].float() + gate * y
        joint = y[:, :plain]
        if turn is not None:
            split = joint.unflatten(1, (3, -1, HEAD_DIM))
            joint = _rotated(split, turn, torch.arange(rows, device="cuda")[piece]).flatten(1)
        return torch.cat((joint, F.gelu(y[:, plain:], approximate="tanh")), 1)

    pieces = slice(0, 128), slice(rows - 128, rows)
    expected = torch.cat(
        (
            right(pieces[0], slice(0, columns)),
            right(pieces[1], slice((groups - 1) * columns, groups * columns)),
        )
    )

    def build(tile: Any) -> Contender:
        out = torch.full((rows, plain or columns), float("nan"), device="cuda")
        out = out.to(x.dtype if epilogue == "gelu" or turned else BF16)
        if start is not None:
            out.copy_(start)
        # The second result lies beside attention's, in the input of the linear that follows.
        joined = torch.full((rows, columns - plain + WIDTH), float("nan"), device="cuda")
        joined = joined.to(x.dtype)
        second = joined[:, WIDTH:] if epilogue == "split" else out
        vectors = scale, bias, gate
        run = native_kernels.linear(x, weight, vectors, (out, second), epilogue, turn, TEXT, tile)

        def result() -> Tensor:
            whole = out.float()
            if epilogue == "split":
                whole = torch.cat((whole, second.float()), 1)
            return torch.cat([whole[piece] for piece in pieces])

        return Contender(run, result)

    tiles = native_kernels.tiles(epilogue, turned, specialized)
    return {str(tile): partial(build, tile) for tile in tiles}, expected


def norms() -> Iterator[Result]:
    """LayerNorm with modulation, and RMSNorm with RoPE; what counts is the bytes they move."""
    import native_kernels

    for rows, kind in itertools.product(ROWS, (BF16, E4M3)):
        x, modulation = _random(rows, WIDTH), torch.randn(4, WIDTH, device="cuda")
        text = (torch.arange(rows, device="cuda") < TEXT)[:, None]
        shift, gain = (torch.where(text, modulation[i], modulation[i + 2]) for i in range(2))
        expected = F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + gain) + shift
        work, shape = x.nbytes + rows * WIDTH * kind.itemsize, f"{rows} tokens"

        out = torch.full(x.shape, float("nan"), device="cuda").to(kind)
        contender = Contender(
            native_kernels.norm(x, out, modulation, TEXT), partial(torch.Tensor.float, out)
        )
        builds: dict[str, Build] = {"": partial(_same, contender)}
        yield from _measure(f"native, norm, {kind}", shape, work, builds, expected, 0.05)

        joint, turn = _random(rows, 3, WIDTH // HEAD_DIM, HEAD_DIM), _turn(rows)
        turned = torch.full(joint.shape, float("nan"), device="cuda").to(kind)
        expected = _rotated(joint, turn, torch.arange(rows, device="cuda"))
        run = native_kernels.rope(joint, turned, turn, TEXT)
        contender = Contender(run, partial(torch.Tensor.float, turned))
        builds = {"": partial(_same, contender)}
        work = joint.nbytes + turned.nbytes
        yield from _measure(f"native, rope, {kind}", shape, work, builds, expected, 0.05)


def _turn(rows: int) -> Any:
    """Norms, and tables of as many rows."""
    import native_kernels

    weights = torch.rand(4, HEAD_DIM, device="cuda") + 0.5
    angles = torch.rand(rows, HEAD_DIM // 2, device="cuda").repeat_interleave(2, -1) * 6
    return native_kernels.Turn(weights, angles.cos(), angles.sin())


def _same(contender: Contender) -> Contender:
    return contender


def _rotated(joint: Tensor, turn: Any, tokens: Tensor) -> Tensor:
    """What norms and RoPE make of [.., 3, heads, head_dim], the rows of these tokens."""
    x, text = joint.float(), (tokens < TEXT)[:, None, None]
    parts = []
    for part in range(2):
        y = x[:, part] / torch.sqrt(x[:, part].square().mean(-1, keepdim=True) + 1e-6)
        y = y * torch.where(text, turn.norms[part], turn.norms[2 + part])
        a, b = y[..., ::2], y[..., 1::2]
        other = torch.stack((-b, a), -1).flatten(-2)
        parts.append(y * turn.cos[tokens][:, None] + other * turn.sin[tokens][:, None])
    return torch.stack((*parts, x[:, 2]), 1)


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

    def native(kind: torch.dtype) -> Contender:
        import native_kernels

        scales = [1.0, 1.0, 1.0]
        given = joint.clone()
        given[:, 0] *= HEAD_DIM**-0.5
        if kind is E4M3:
            scales = [float(given[:, i].float().abs().max()) / LARGEST for i in range(3)]
            steps = torch.tensor(scales, device="cuda")[:, None, None]
            given = (given.float() / steps).to(E4M3)
        # No result is larger than the largest of V.
        step = native_kernels.step_of(*scales, scales[2])
        out = torch.full(joint[:, 0].shape, float("nan"), device="cuda").to(kind)
        run = native_kernels.attention(given, out, step)
        return Contender(run, lambda: out.transpose(0, 1).float() * scales[2])

    return {
        "torch, FlashAttention": lambda: by_torch(SDPBackend.FLASH_ATTENTION),
        "torch, cuDNN": lambda: by_torch(SDPBackend.CUDNN_ATTENTION),
        "native, bf16": lambda: native(BF16),
        "native, fp8": lambda: native(E4M3),
    }


def graphs() -> Iterator[Any]:
    """Whether kernels and cuDNN's attention are recorded in a CUDA graph, and run from it."""
    import native_kernels

    cuda, tokens = native_kernels.device(), ROWS[1]
    x, modulation = _random(tokens, WIDTH), torch.randn(4, WIDTH, device="cuda")
    normed = torch.zeros_like(x)
    joint = _random(tokens, 3, WIDTH // HEAD_DIM, HEAD_DIM)
    mixed = torch.zeros_like(joint[:, 0])
    torch.cuda.synchronize()
    stream = cuda.create_stream()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        runs = [
            native_kernels.norm(x, normed, modulation, TEXT),
            native_kernels.attention(joint, mixed, native_kernels.step_of(1, 1, 1, 1)),
        ]
        for run in runs:
            run()
        cuda.synchronize(stream)
        expected = normed.clone(), mixed.clone()
        normed.zero_()
        mixed.zero_()
        cuda.synchronize(stream)
        cuda.begin_capture(stream)
        for run in runs:
            run()
        graph = cuda.end_capture(stream)
        cuda.launch_graph(graph, stream)
        cuda.synchronize(stream)
    for what, found, right in zip(("norm", "attention"), (normed, mixed), expected, strict=True):
        yield Result("CUDA graph", variant=what, error=relative_error(found, right))


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
    "linears": partial(linears, False),
    "specialized": partial(linears, True),
    "norms": norms,
    "graphs": graphs,
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
