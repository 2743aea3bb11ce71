"""A GPU whose memory is host memory, and an engine that computes the tiny component on it."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from engines.cuda import Cuda
from engines.tensorrt.loaded import Profile, Shape
from fluxdeploy.errors import EngineError
from tests.engines.conftest import INPUTS, OUTPUTS, expected

__all__ = ["FakeCuda", "FakeLoaded", "profile"]


class FakeCuda(Cuda):
    """Checks that every address belongs to a living block, and that copies stay inside it.

    As on a GPU, what a stream is given is done by the time that somebody waits for it: here then,
    and not before. Freeing memory waits for all streams. `used` are the devices that threads had
    as theirs while they touched memory or streams.
    """

    def __init__(self) -> None:
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.calls: Counter[str] = Counter()
        self.memory = 1 << 40
        self.used: set[int] = set()
        self._current = threading.local()
        self._queues: dict[int, list[Callable[[], None]]] = {}

    def use_device(self, device: int) -> None:
        self._current.device = device

    def _use(self) -> None:
        self.used.add(getattr(self._current, "device", 0))

    def free_memory(self) -> int:
        return self.memory

    def allocate(self, size: int) -> int:
        self._use()
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
        self._use()
        for stream in self.streams:
            self._finish(stream)
        del self.device[address]

    def free_host(self, address: int) -> None:
        del self.host[address]

    def create_stream(self) -> int:
        self.streams.add(len(self.streams) + 1)
        return len(self.streams)

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self.streams
        self._use()
        self._queues.setdefault(stream, []).append(work)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams
        self._finish(stream)

    def _finish(self, stream: int) -> None:
        queued, self._queues[stream] = self._queues.get(stream, []), []
        for work in queued:
            work()

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        self.calls["copy_in"] += 1

        def work() -> None:
            assert size <= len(self.device[device])
            ctypes.memmove(device, host, size)

        self.queue(stream, work)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        def work() -> None:
            assert size <= len(self.device[device])
            assert size <= len(self.host[host])
            ctypes.memmove(host, device, size)

        self.queue(stream, work)


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


class FakeLoaded:
    """As `LoadedEngine`: the tiny component, from what lies at the addresses it was given."""

    component = "tiny"

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
        def work() -> None:
            if index != self.active:
                self._shapes.clear()
            self.active = index

        self.cuda.queue(stream, work)

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

    def enqueue(self, stream: int) -> None:
        assert not self.closed
        self.calls["enqueue"] += 1
        if self.fails:
            raise EngineError("tiny: TensorRT failed while it ran: it gives no reason.")
        shapes, addresses, block = dict(self._shapes), dict(self._addresses), self._block
        assert block is not None

        def work() -> None:
            assert not self.closed
            assert len(self.cuda.device[block[0]]) >= block[1], "the scratch block is gone"
            inputs = {
                spec.name: self._array(addresses[spec.name], shapes[spec.name], spec.dtype)
                for spec in INPUTS
            }
            result = expected(**inputs)
            self._array(addresses["y"], result.shape, "float32")[...] = result

        self.cuda.queue(stream, work)

    def _array(self, address: int, shape: Shape, dtype: str) -> Any:
        size = int(np.prod(shape)) * 4
        block = self.cuda.device[address]
        assert len(block) >= size
        return np.frombuffer(block, dtype, int(np.prod(shape))).reshape(shape)

    def close(self) -> None:
        assert self._block is None or not self.closed
        self.closed = True
