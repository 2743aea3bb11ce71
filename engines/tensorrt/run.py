"""Running TensorRT engines: memory, shapes, profiles, bindings.

The library's own objects are behind `LoadedEngine`, CUDA's behind `Cuda`; what is here is the
logic between them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from weakref import WeakSet

import numpy as np

from engines.base import Array, Binding, Engine, EngineOptions
from engines.cuda import Cuda, pinned_array
from engines.tensorrt.loaded import LoadedEngine, Profile, Shape
from engines.tensors import BoundInputs, output_shape
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, TensorSpec
from fluxdeploy.errors import EngineError

__all__ = ["Scratch", "TensorRtEngine"]


class Scratch:
    """One block of device memory that all engines of a GPU compute in, one after the other.

    It grows to what the hungriest engine needs and is freed with the last one. `lock` is held
    while an engine runs, since two cannot use the block at once. `generation` changes whenever
    the block's address does.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self._cuda = cuda
        self._address = self._size = self._users = 0

    def retain(self) -> None:
        with self.lock:
            self._users += 1

    def release(self) -> None:
        """Free the block where nobody is left."""
        with self.lock:
            self._users -= 1
            if self._users == 0:
                self._drop()

    def require(self, size: int) -> int:
        """The address of a block of at least `size` bytes. No engine may be running."""
        with self.lock:
            if size > self._size or not self._address:
                self._drop()  # first, so that old and new need not fit side by side
                self._address = self._cuda.allocate(size)
                self._size = size
            return self._address

    def _drop(self) -> None:
        if self._address:
            address, self._address, self._size = self._address, 0, 0
            self.generation += 1
            self._cuda.free(address)


class TensorRtEngine(Engine):
    """A loaded engine with the memory around it. Engines that share a `Scratch` take turns."""

    def __init__(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        loaded: LoadedEngine,
        cuda: Cuda,
        scratch: Scratch,
        options: EngineOptions,
    ) -> None:
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self.cuda = cuda
        self.scratch = scratch
        self._device = options.device
        self._loaded: LoadedEngine | None = loaded
        self.configured: object = None
        # A binding frees its own memory when it goes; those that are left go with the engine.
        self._bindings: WeakSet[_TensorRtBinding] = WeakSet()
        self._default: _TensorRtBinding | None = None
        try:
            self._check_tensors(loaded)
            self.stream = cuda.create_stream()
        except BaseException:
            loaded.close()
            raise
        scratch.retain()

    def _check_tensors(self, loaded: LoadedEngine) -> None:
        wanted = {spec.name: spec.dtype for spec in (*self.inputs, *self.outputs)}
        if loaded.tensors != wanted:
            raise EngineError(
                f"{self.component}: the engine has the tensors {loaded.tensors}, and the manifest "
                f"says {wanted}. Build the bundle again."
            )

    @property
    def loaded(self) -> LoadedEngine:
        return self._while_open(self._loaded)

    def use_device(self) -> None:
        """CUDA's current device is a matter of the thread."""
        self.cuda.use_device(self._device)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self.scratch.lock:  # until the outputs are copied, which the next call overwrites
            if self._default is None:
                self._default = _TensorRtBinding(self, {})
            return {name: np.array(a) for name, a in self._default.run(inputs).items()}

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _TensorRtBinding(self, resident)

    def adopt(self, binding: _TensorRtBinding) -> None:
        """Free a binding's device memory with the engine, at the latest.

        Raises `EngineError` where the engine was closed.
        """
        _ = self.loaded
        self._bindings.add(binding)

    def choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """The narrowest profile that takes these shapes: it is tuned closest to them."""
        fitting = [
            (_span(profile), index)
            for index, profile in enumerate(self.loaded.profiles)
            if all(_fits(shapes[name], profile[name]) for name in profile)
        ]
        if not fitting:
            asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise EngineError(
                f"{self.component}: no resolution bucket of this engine takes {asked}; it has "
                f"{'; '.join(_in_words(profile) for profile in self.loaded.profiles)}."
            )
        return min(fitting)[1]

    def close(self) -> None:
        if self._loaded is None:
            return
        with self.scratch.lock:
            self.use_device()
            # What is queued may still use the memory. A lost GPU must not keep the rest alive.
            with suppress(EngineError):
                self.cuda.synchronize(self.stream)
            for binding in list(self._bindings):
                binding.free()
            self._default = None
            loaded, self._loaded = self._loaded, None
            loaded.close()
            with suppress(EngineError):
                self.cuda.destroy_stream(self.stream)
            self.scratch.release()


def _fits(shape: Shape, allowed: tuple[Shape, Shape, Shape]) -> bool:
    smallest, _, largest = allowed
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )


def _span(profile: Profile) -> float:
    """How wide a profile is: the product over all axes of largest to smallest, as a logarithm."""
    return float(
        sum(
            np.log(np.maximum(largest, 1) / np.maximum(smallest, 1)).sum()
            for smallest, _, largest in profile.values()
        )
    )


def _in_words(profile: Profile) -> str:
    return ", ".join(
        f"{name} {list(smallest)} to {list(largest)}"
        for name, (smallest, _, largest) in profile.items()
    )


class _TensorRtBinding(Binding):
    """Resident inputs lie on the device; buffers for the others stay while shapes do."""

    def __init__(self, engine: TensorRtEngine, resident: Mapping[str, Array]) -> None:
        self._engine = engine
        self._inputs = BoundInputs(engine, resident)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._staging: dict[str, Array] = {}
        self._outputs: dict[str, Array] = {}
        self._sizes: dict[str, int] | None = None
        self._profile = 0
        # The engine remembers whose shapes its context has, without keeping the binding alive.
        self._token = object()
        self._scratch_generation = -1
        with engine.scratch.lock:
            engine.adopt(self)
            engine.use_device()
            for spec in self._inputs.resident:
                array = np.ascontiguousarray(resident[spec.name])
                self._shapes[spec.name] = array.shape
                self._addresses[spec.name] = engine.cuda.allocate(array.nbytes)
                engine.cuda.copy_in(
                    self._addresses[spec.name], array.ctypes.data, array.nbytes, engine.stream
                )
                engine.cuda.synchronize(engine.stream)  # the array may go

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        engine = self._engine
        sizes = self._inputs.check(inputs)
        with engine.scratch.lock:
            loaded = engine.loaded  # only now: another thread may have closed it
            engine.use_device()
            if sizes != self._sizes:
                self._prepare(sizes, inputs)
            for name, array in inputs.items():
                staged = self._staging[name]
                np.copyto(staged, array)
                engine.cuda.copy_in(
                    self._addresses[name], staged.ctypes.data, staged.nbytes, engine.stream
                )
            self._configure(loaded)
            loaded.enqueue(engine.stream)
            for name, array in self._outputs.items():
                engine.cuda.copy_out(
                    array.ctypes.data, self._addresses[name], array.nbytes, engine.stream
                )
            engine.cuda.synchronize(engine.stream)
        return self._outputs

    def _prepare(self, sizes: dict[str, int], inputs: Mapping[str, Array]) -> None:
        """Choose the profile and make the buffers for new shapes."""
        engine = self._engine
        shapes = self._shapes | {name: array.shape for name, array in inputs.items()}
        ordered = {spec.name: shapes[spec.name] for spec in engine.inputs}
        profile = engine.choose_profile(ordered)
        self._sizes = None  # half made, should anything below fail
        for spec in (*self._inputs.changing, *engine.outputs):
            if (address := self._addresses.pop(spec.name, 0)) != 0:
                engine.cuda.free(address)
        self._shapes, self._profile = ordered, profile
        self._apply_shapes(engine.loaded)
        for spec in self._inputs.changing:
            self._staging[spec.name] = self._buffer(spec, ordered[spec.name])
        # New arrays, not the old ones resized: the caller may still look at those.
        self._outputs = {
            spec.name: self._buffer(spec, self._output_shape(spec, sizes))
            for spec in engine.outputs
        }
        self._sizes = sizes

    def _buffer(self, spec: TensorSpec, shape: Shape) -> Array:
        """Memory for a tensor on the device, and an array like it on the host."""
        array = pinned_array(self._engine.cuda, shape, spec.dtype)
        self._addresses[spec.name] = self._engine.cuda.allocate(array.nbytes)
        return array

    def _output_shape(self, spec: TensorSpec, sizes: dict[str, int]) -> Shape:
        shape = output_shape(spec, sizes) or self._engine.loaded.shape(spec.name)
        if any(size < 0 for size in shape):
            raise EngineError(
                f"{self._engine.component}: the shape of {spec.name} does not follow from the "
                "inputs."
            )
        return shape

    def _apply_shapes(self, loaded: LoadedEngine) -> None:
        loaded.set_profile(self._profile, self._engine.stream)
        self._engine.cuda.synchronize(self._engine.stream)
        for name, shape in self._shapes.items():
            loaded.set_shape(name, shape)
        self._engine.configured = None

    def _configure(self, loaded: LoadedEngine) -> None:
        """Give the context this binding's shapes and addresses, where it has others."""
        engine = self._engine
        if (
            engine.configured is self._token
            and self._scratch_generation == engine.scratch.generation
        ):
            return
        self._apply_shapes(loaded)
        size = loaded.scratch_size()
        loaded.set_scratch(engine.scratch.require(size), size)
        for name, address in self._addresses.items():
            loaded.set_address(name, address)
        self._scratch_generation = engine.scratch.generation
        engine.configured = self._token

    def free(self) -> None:
        """Free what lies on the device. Arrays that the caller holds stay."""
        for address in self._addresses.values():
            with suppress(EngineError):
                self._engine.cuda.free(address)
        self._addresses.clear()
        self._staging.clear()
        self._outputs = {}
        self._sizes = None

    def __del__(self) -> None:
        # `cudaFree` waits for work on the memory, and takes any device's addresses.
        if hasattr(self, "_addresses"):
            self.free()
