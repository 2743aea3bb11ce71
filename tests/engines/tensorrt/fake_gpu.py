"""A GPU whose memory is host memory, and a plan that computes the tiny component on it."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from engines.cuda import Cuda
from engines.tensorrt.loaded import Profile, Shape
from fluxdeploy.errors import EngineError
from tests.engines.conftest import INPUTS, OUTPUTS, expected

__all__ = ["FakeCuda", "FakePlan", "profile"]


class FakeCuda(Cuda):
    """Checks that every address belongs to a living block, and that copies stay inside it.

    Work is done at once, but for what is recorded between `begin_capture` and `end_capture`.
    """

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: set[int] = set()
        self.calls: Counter[str] = Counter()
        self.recording: list[Callable[[], None]] | None = None
        self.memory = 1 << 40
        self._recorded: dict[int, list[Callable[[], None]]] = {}

    def use_device(self, device: int) -> None:
        self.calls[f"device {device}"] += 1

    def free_memory(self) -> int:
        return self.memory

    def allocate(self, size: int) -> int:
        if size > self.memory:
            raise EngineError("cudaMalloc failed: out of memory.")
        return self._block(self.device, size)

    def allocate_host(self, size: int) -> int:
        return self._block(self.host, size)

    def _block(self, blocks: dict[int, Any], size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.device[address]

    def free_host(self, address: int) -> None:
        del self.host[address]

    def create_stream(self) -> int:
        self.streams.add(len(self.streams) + 1)
        return len(self.streams)

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams
        assert self.recording is None

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        self.calls["copy_in"] += 1
        assert stream in self.streams
        assert size <= len(self.device[device])
        ctypes.memmove(device, host, size)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        assert size <= len(self.device[device])
        assert size <= len(self.host[host])
        ctypes.memmove(host, device, size)

    def begin_capture(self, stream: int) -> None:
        assert self.recording is None
        self.recording = []

    def end_capture(self, stream: int) -> Any:
        assert self.recording is not None
        graph = len(self._recorded) + 1
        self._recorded[graph], self.recording = self.recording, None
        self.graphs.add(graph)
        self.calls["capture"] += 1
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        assert graph in self.graphs
        self.calls["launch"] += 1
        for work in self._recorded[graph]:
            work()

    def destroy_graph(self, graph: Any) -> None:
        self.graphs.remove(graph)


def profile(batch: tuple[int, int, int], tokens: tuple[int, int, int]) -> Profile:
    """A profile of the tiny component."""
    sizes = {"B": batch, "T": tokens}
    return {
        spec.name: (
            tuple(sizes[d][0] if isinstance(d, str) else d for d in spec.shape),
            tuple(sizes[d][1] if isinstance(d, str) else d for d in spec.shape),
            tuple(sizes[d][2] if isinstance(d, str) else d for d in spec.shape),
        )
        for spec in INPUTS
    }


class FakePlan:
    """As `Plan`: the tiny component, computed from what lies at the addresses it was given."""

    component = "tiny"
    records_graphs = False

    def __init__(self, cuda: FakeCuda, *profiles: Profile, scratch: int = 1000) -> None:
        self.cuda = cuda
        self.profiles = profiles
        self.tensors = {spec.name: spec.dtype for spec in (*INPUTS, *OUTPUTS)}
        self.scratch = scratch
        self.calls: Counter[str] = Counter()
        self.active = 0
        self.closed = False
        self.fails = False
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._block: tuple[int, int] | None = None

    def set_profile(self, index: int, stream: int) -> None:
        if index != self.active:
            self._shapes.clear()
        self.active = index

    def set_shape(self, name: str, shape: Shape) -> None:
        self.calls["set_shape"] += 1
        low, _, high = self.profiles[self.active][name]
        assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self._shapes[name] = shape
        self._block = None  # its size follows from the shapes

    def set_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def shape(self, name: str) -> Shape:
        return self._shapes["x"]

    def scratch_size(self) -> int:
        return self.scratch

    def set_scratch(self, address: int, size: int) -> None:
        self._block = address, size

    def can_be_captured(self, stream: int) -> bool:
        return True

    def enqueue(self, stream: int) -> None:
        assert not self.closed
        self.calls["enqueue"] += 1
        if self.fails:
            raise EngineError("tiny: TensorRT failed while it ran: it gives no reason.")
        shapes, addresses, block = dict(self._shapes), dict(self._addresses), self._block
        assert block is not None

        def work() -> None:
            assert len(self.cuda.device[block[0]]) >= block[1], "the scratch block is gone"
            inputs = {
                spec.name: self._array(addresses[spec.name], shapes[spec.name], spec.dtype)
                for spec in INPUTS
            }
            result = expected(**inputs)
            self._array(addresses["y"], result.shape, "float32")[...] = result

        if self.cuda.recording is None:
            work()
        else:
            self.cuda.recording.append(work)

    def _array(self, address: int, shape: Shape, dtype: str) -> Any:
        size = int(np.prod(shape)) * 4
        block = self.cuda.device[address]
        assert len(block) >= size
        return np.frombuffer(block, dtype, int(np.prod(shape))).reshape(shape)

    def close(self) -> None:
        assert self._block is None or not self.closed
        self.closed = True
