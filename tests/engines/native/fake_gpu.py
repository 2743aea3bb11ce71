"""A GPU whose memory is host memory, and kernels of a native engine in NumPy over its addresses.

A kernel sees what it is launched with and nothing else: tensors by address, sizes and strides. So
an engine that gives the right numbers here has told its kernels the right things.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cuda import Argument, TensorMap
from engines.native.plan import Kind
from engines.native.specs import PARAMETERS, KernelSpec
from tests.engines.tensorrt.fake_gpu import FakeCuda
from tests.support.native_plan import TYPES, gelu, rounded

__all__ = ["FakeCudnn", "FakeGpu"]

Floats = NDArray[np.float32]
_EPSILON = np.float32(1e-6)
_LARGEST_BOX = 256


class FakeGpu(FakeCuda):
    """`specs` are the forms of the kernels that may be loaded, by the bytes of their cubin."""

    def __init__(self, specs: Mapping[bytes, KernelSpec]) -> None:
        super().__init__()
        self.specs = specs
        self.modules: dict[int, KernelSpec] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launched: list[str] = []
        self.handles: set[int] = set()
        self.shared_out = 0
        """How many launches had tiles that programs share."""
        self._made = 0
        self._recorded: dict[int, list[Callable[[], None]]] = {}
        self._aligned: list[Any] = []

    def _block(self, blocks: dict[int, Any], size: int) -> int:
        memory = ctypes.create_string_buffer(max(size, 1) + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        ctypes.memset(address, 0xFF, max(size, 1))  # NaN, in every type
        self._aligned.append(memory)
        blocks[address] = (ctypes.c_char * max(size, 1)).from_address(address)
        return address

    def _next(self) -> int:
        self._made += 1
        return self._made

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """Also into the middle of a block, as weights are copied in pieces."""

        def work() -> None:
            self.check(device, size)
            ctypes.memmove(device, host, size)

        self.queue(stream, work)

    def check(self, address: int, size: int) -> None:
        """Some bytes must lie in one living block."""
        assert any(
            start <= address and address + size <= start + len(block)
            for start, block in self.device.items()
        ), f"{size} bytes at {address} are in no block"

    def multiprocessors(self, device: int) -> int:
        return 3

    def load_module(self, cubin: bytes) -> int:
        module = self._next()
        self.modules[module] = self.specs[cubin]
        return module

    def unload_module(self, module: int) -> None:
        del self.modules[module]

    def function(self, module: int, name: str, shared: int) -> int:
        return module

    def arguments(self, values: Sequence[Argument]) -> Any:
        return list(values)

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        if stream in self._recorded:
            self._recorded[stream].append(work)
        else:
            super().queue(stream, work)

    def begin_capture(self, stream: int) -> None:
        self._recorded[stream] = []

    def end_capture(self, stream: int) -> int:
        graph = self._next()
        self.graphs[graph] = self._recorded.pop(stream)
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        self.calls["launch_graph"] += 1
        for work in self.graphs[graph]:
            self.queue(stream, work)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def launch(
        self,
        function: int,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Any,
        stream: int,
    ) -> None:
        spec = self.modules[function]
        given = dict(zip(PARAMETERS[spec.function], arguments, strict=True))
        kernel = _KERNELS[spec.function]
        self.launched.append(spec.function)
        assert min(grid) >= 1
        self.queue(stream, lambda: kernel(_Launched(self, spec, grid, given)))

    def matrix(self, address: int, rows: int, columns: int, stride: int, kind: Kind) -> Any:
        """Memory as [rows, columns], rows `stride` bytes apart. It must lie in one living block."""
        dtype = np.dtype(TYPES[kind])
        size = (rows - 1) * stride + columns * dtype.itemsize
        self.check(address, size)
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
        numbers = flat[: size - size % dtype.itemsize].view(dtype)
        return np.lib.stride_tricks.as_strided(numbers, (rows, columns), (stride, dtype.itemsize))


class _Launched:
    """What a kernel was launched with."""

    def __init__(
        self, gpu: FakeGpu, spec: KernelSpec, grid: tuple[int, int], given: Mapping[str, Argument]
    ) -> None:
        self.gpu, self.spec, self.grid = gpu, spec, grid
        self.given = given

    def constant(self, name: str) -> int:
        return int(self.spec.constants[name])

    def number(self, name: str) -> Any:
        argument = self.given[name]
        assert not isinstance(argument, TensorMap)
        kind, value = argument
        return np.float32(value) if kind == "fp32" else int(value)

    def rows(self, name: str, rows: int, columns: int, stride: int) -> Any:
        """A pointer's memory, rows `stride` numbers apart."""
        kind = self.spec.types[name]
        address = self.number(name)
        assert address % 16 == 0
        size = np.dtype(TYPES[kind]).itemsize
        return self.gpu.matrix(address, rows, columns, stride * size, kind)

    def tensor(self, name: str) -> Any:
        tensor = self.given[name]
        assert isinstance(tensor, TensorMap)
        kind = self.spec.types[name]
        # What the driver asks of a tensor map.
        assert tensor.address % 16 == tensor.row_bytes % 16 == 0
        assert tensor.element == np.dtype(TYPES[kind]).itemsize
        assert max(tensor.box) <= _LARGEST_BOX
        assert tensor.box[1] * tensor.element <= 128
        size = tensor.rows, tensor.columns
        return self.gpu.matrix(tensor.address, *size, tensor.row_bytes, kind)

    def write(self, out: Any, values: Floats, name: str) -> None:
        assert not np.isnan(values).any(), f"{self.spec.function} read what nobody wrote"
        kind = self.spec.types[name]
        out[:] = rounded(values, kind).astype(TYPES[kind])

    def by_token(self, rows: int, text: str, image: str) -> Any:
        is_text = np.arange(rows) < self.number("text_tokens")
        return np.where(is_text, self.number(text), self.number(image))

    def turn(self, heads: Floats, part: int, group: Any) -> Floats:
        """Norms and RoPE of [rows, heads, head_dim]."""
        rows, _, head_dim = heads.shape
        if part < 2:
            norms = self.rows("norms", 4, head_dim, head_dim)
            tables = [self.rows(name, rows, head_dim, head_dim)[:, None] for name in ("cos", "sin")]
            heads = heads / np.sqrt(np.square(heads).mean(-1, keepdims=True) + _EPSILON)
            heads = heads * norms[2 * group + part][:, None]
            turned = np.stack((-heads[..., 1::2], heads[..., ::2]), -1).reshape(heads.shape)
            heads = heads * tables[0] + turned * tables[1]
        return heads * self.number(("factor_q", "factor_k", "factor_v")[part])


def _convert(run: _Launched) -> None:
    rows, columns = run.grid[0], run.constant("COLUMNS")
    x = run.rows("x", rows, columns, run.constant("X_STRIDE")).astype(np.float32)
    out = run.rows("out", rows, columns, run.constant("OUT_STRIDE"))
    run.write(out, x * run.by_token(rows, "inverse_text", "inverse_image")[:, None], "out")


def _norm(run: _Launched) -> None:
    rows, width = run.grid[0], run.constant("WIDTH")
    x = run.rows("x", rows, width, width).astype(np.float32)
    x -= x.mean(-1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + _EPSILON)
    shift, gain = (
        _modulation(run, "modulation", run.by_token(rows, f"{name}_text", f"{name}_image"), width)
        for name in ("shift", "gain")
    )
    x = x * (1 + gain) + shift
    out = run.rows("out", rows, width, run.constant("OUT_STRIDE"))
    run.write(out, x * run.by_token(rows, "inverse_text", "inverse_image")[:, None], "out")


def _modulation(run: _Launched, name: str, rows: Any, width: int) -> Any:
    """Rows of the modulation, one for each token."""
    return run.rows(name, int(rows.max()) + 1, width, width)[rows]


def _rope(run: _Launched) -> None:
    (rows, parts), width = run.grid, run.constant("WIDTH")
    x = run.rows("x", rows, 3 * width, 3 * width)
    out = run.rows("out", rows, 3 * width, 3 * width)
    group = (np.arange(rows) >= run.number("text_tokens")).astype(int)
    for part in range(parts):
        some = slice(part * width, (part + 1) * width)
        heads = x[:, some].astype(np.float32).reshape(rows, -1, run.constant("HEAD_DIM"))
        run.write(out[:, some], run.turn(heads, part, group).reshape(rows, width), "out")


def _linear(run: _Launched) -> None:
    rows, columns, inner = run.number("rows"), run.constant("COLUMNS"), run.constant("INNER")
    if run.spec.function == "specialized":
        _check_shared_out(run, rows, columns)
    x, weight = (run.tensor(name).astype(np.float32) for name in ("x", "weight"))
    groups = 2 if run.constant("GROUPED") else 1
    assert x.shape == (rows, inner)
    assert weight.shape == (groups * columns, inner)
    text = run.number("text_tokens")
    group = np.zeros(rows, int)
    if groups == 2:
        group += np.arange(rows) >= text
    pairs = [
        (run.number(f"{name}_text"), run.number(f"{name}_image")) for name in ("gate", "inverse")
    ]
    if groups == 2 or any(len(set(pair)) == 2 for pair in pairs):
        # A tile has rows of one stream.
        assert text >= rows or text % run.constant("TILE_ROWS") == 0
    bias = run.rows("bias", 1, groups * columns, groups * columns)[0].reshape(groups, columns)
    y = np.empty((rows, columns), np.float32)
    for index in range(groups):
        some = weight[index * columns : (index + 1) * columns]
        y[group == index] = x[group == index] @ some.T
    if run.constant("SCALED"):
        scale = run.rows("scale", 1, groups * columns, groups * columns)[0]
        y *= scale.reshape(groups, columns)[group]
    y += bias[group]
    inverse = run.by_token(rows, "inverse_text", "inverse_image")[:, None]
    out, epilogue, split = run.tensor("out"), run.spec.constants["EPILOGUE"], run.constant("SPLIT")
    if epilogue == "gelu":
        run.write(out, gelu(y) * inverse, "out")
    elif epilogue == "residual":
        gate = _modulation(run, "gate", run.by_token(rows, "gate_text", "gate_image"), columns)
        run.write(out, out.astype(np.float32) + gate * y, "out")
    else:
        if epilogue == "split":
            run.write(run.tensor("second"), gelu(y[:, split:]) * inverse, "second")
            y = y[:, :split]
        if run.spec.constants.get("TURN"):
            heads = y.reshape(rows, 3, -1, 128)
            parts = [run.turn(heads[:, part], part, group) for part in range(3)]
            y = np.stack(parts, 1).reshape(rows, -1)
        assert out.shape == y.shape
        run.write(out, y, "out")


def _check_shared_out(run: _Launched, rows: int, columns: int) -> None:
    """Tiles that programs share out have room for their sums, and marks that are taken away."""
    high, wide = run.constant("TILE_ROWS"), run.constant("TILE_COLUMNS")
    (programs, _), threads = run.grid, 2 * 128
    tiles = -(-rows // high) * (columns // wide)
    left = tiles % programs
    parts = min(programs // max(left, 1), run.constant("PARTS"))
    slots = left * (max(parts, 1) - 1)
    if slots:
        run.gpu.shared_out += 1
        run.rows("partials", slots, high * wide, high * wide)
        assert not run.rows("marks", slots, threads, threads).any()


_KERNELS: Mapping[str, Callable[[_Launched], None]] = {
    "convert": _convert,
    "norm": _norm,
    "rope": _rope,
    "linear": _linear,
    "specialized": _linear,
}


class FakePrepared:
    """Attention over addresses of a `FakeGpu`."""

    def __init__(self, cudnn: FakeCudnn, kind: Kind, sizes: tuple[int, int, int], strides: Any):
        self.workspace = 1000
        self._cudnn, self._kind, self._sizes, self._strides = cudnn, kind, sizes, strides

    def launch(self, x: Sequence[int], out: int, numbers: int, workspace: int) -> None:
        gpu = self._cudnn.gpu
        assert workspace in gpu.device
        assert len(gpu.device[workspace]) >= self.workspace
        gpu.launched.append("attention")
        gpu.queue(self._cudnn.stream, lambda: self._run(x, out, numbers))

    def _run(self, x: Sequence[int], out: int, numbers: int) -> None:
        gpu, kind = self._cudnn.gpu, self._kind
        tokens, heads, head_dim = self._sizes
        size = np.dtype(TYPES[kind]).itemsize
        width = heads * head_dim

        def matrix(address: int, stride: int) -> Any:
            return gpu.matrix(address, tokens, width, stride * size, kind)

        q, k, v = (
            matrix(address, self._strides["x"])
            .astype(np.float32)
            .reshape(tokens, heads, head_dim)
            .swapaxes(0, 1)
            for address in x
        )
        scales = np.ones(6, np.float32)
        if kind == "fp8":
            scales = gpu.matrix(numbers, 6, 1, 16, "f32")[:, 0]
        scores = (q @ k.swapaxes(1, 2)) * (scales[0] * scales[1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = rounded(weights / weights.sum(-1, keepdims=True) * scales[4], kind)
        mixed = (weights @ v) * (scales[2] * scales[3] * scales[5])
        assert not np.isnan(mixed).any(), "attention read what nobody wrote"
        result = mixed.swapaxes(0, 1).reshape(tokens, width)
        matrix(out, self._strides["out"])[:] = rounded(result, kind).astype(TYPES[kind])


class FakeCudnn:
    """`Cudnn` on a `FakeGpu`."""

    def __init__(self, gpu: FakeGpu, stream: int) -> None:
        self.gpu, self.stream = gpu, stream
        gpu.handles.add(id(self))

    def prepare(
        self, kind: Kind, tokens: int, heads: int, head_dim: int, strides: Mapping[str, int]
    ) -> FakePrepared:
        return FakePrepared(self, kind, (tokens, heads, head_dim), strides)

    def close(self) -> None:
        self.gpu.handles.remove(id(self))
