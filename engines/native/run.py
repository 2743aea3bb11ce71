"""Running a native engine: its weights on the GPU once, and a CUDA graph for each picture size."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Binding, Engine, EngineOptions
from engines.cuda import Cuda, pinned_array
from engines.native.attention import SCALAR_BYTES, Cudnn, PreparedAttention, scalars
from engines.native.file import EngineFile, read_engine
from engines.native.launches import (
    AttentionCall,
    Call,
    Launch,
    Sizes,
    list_launches,
    partials_bytes,
)
from engines.native.memory import lay_out
from engines.native.plan import BYTES, Attention, Plan
from engines.native.works import read_works
from engines.tensors import BoundInputs, check_boundary, output_shape
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.errors import EngineError

__all__ = ["NativeEngine", "open_engine"]

_CHUNK = 64 << 20
"""Bytes of weights that are read from the file at a time."""


def open_engine(
    component: str,
    record: ComponentRecord,
    engine: EngineRecord,
    path: Path,
    options: EngineOptions,
) -> NativeEngine:
    """Open the engine file at `path`. The errors are those of `Runtime.open`."""
    cuda = Cuda()
    cuda.use_device(options.device)
    return NativeEngine(component, record, engine, read_engine(path), cuda, Cudnn, options)


class _Attentions:
    """What attention takes on the device: compiled calls, and their scales."""

    def __init__(self, plan: Plan, cuda: Cuda, cudnn: Cudnn, stream: int) -> None:
        self._plan, self._cuda, self._cudnn = plan, cuda, cudnn
        self._prepared: dict[tuple[str, int, int], PreparedAttention] = {}
        steps = [s for s in plan.steps if isinstance(s, Attention)]
        narrow = [s for s in steps if plan.buffer(s.x.buffer).kind == "fp8"]
        self._numbers = {step: SCALAR_BYTES * index for index, step in enumerate(narrow)}
        self._scales = 0
        try:
            self._scales = cuda.allocate(SCALAR_BYTES * len(narrow))
            for step, offset in self._numbers.items():
                block = np.ascontiguousarray(scalars(step))
                cuda.copy_in(self._scales + offset, block.ctypes.data, block.nbytes, stream)
                cuda.synchronize(stream)  # the block may go
        except BaseException:
            self.close()
            raise

    def prepare(self, calls: Sequence[Call], tokens: int) -> int:
        """Compile what `calls` need. Returns the bytes that they need as a workspace."""
        prepared = [self._of(call, tokens) for call in calls if isinstance(call, AttentionCall)]
        return max((each.workspace for each in prepared), default=0)

    def _of(self, call: AttentionCall, tokens: int) -> PreparedAttention:
        plan = self._plan
        kind = plan.buffer(call.step.x.buffer).kind
        key = kind, tokens, call.out_stride
        if key not in self._prepared:
            strides = {"x": 3 * plan.width, "out": call.out_stride}
            self._prepared[key] = self._cudnn.prepare(
                kind, tokens, plan.heads, plan.head_dim, strides
            )
        return self._prepared[key]

    def queue(self, call: AttentionCall, tokens: int, workspace: int) -> None:
        plan = self._plan
        part = plan.width * BYTES[plan.buffer(call.step.x.buffer).kind]
        x = [call.x + part * index for index in range(3)]
        numbers = self._scales + self._numbers.get(call.step, 0)
        self._of(call, tokens).launch(x, call.out, numbers, workspace)

    def close(self) -> None:
        self._prepared.clear()
        if self._scales:
            with suppress(EngineError):
                self._cuda.free(self._scales)
        self._cudnn.close()


class _Room:
    """Memory on the device for what lasts no longer than a picture. It grows, and then moves."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._size = 0
        self.address = 0
        self.moves = 0
        """How often what was recorded with an earlier address became wrong."""

    def require(self, size: int) -> None:
        """Make it no smaller than this. Raises `EngineError` where there is no memory for it."""
        if size > self._size:
            self.free()
            self.address, self._size = self._cuda.allocate(size), size

    def free(self) -> None:
        if self.address:
            # Before anything can fail: nothing may use it from here on.
            address, self.address, self._size = self.address, 0, 0
            self.moves += 1
            self._cuda.free(address)


class NativeEngine(Engine):
    """An opened engine. Calls of all its bindings take turns, and compute in one block of memory.

    The pictures of a batch go one after the other, which loses little: one fills the GPU.
    """

    def __init__(
        self,
        component: str,
        record: ComponentRecord,
        engine: EngineRecord,
        file: EngineFile,
        cuda: Cuda,
        cudnn: type[Cudnn],
        options: EngineOptions,
    ) -> None:
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self.cuda = cuda
        self.plan = file.plan
        self.lock = threading.RLock()
        self._file = file
        self._device = options.device
        self._bindings: WeakSet[_NativeBinding] = WeakSet()
        self._default: _NativeBinding | None = None
        self._modules: list[int] = []
        self._functions: dict[str, int] = {}
        self._weights = self._partials = 0
        self._scratch, self._workspace = _Room(cuda), _Room(cuda)
        self._attentions: _Attentions | None = None
        self.stream = 0
        self._open = True
        _check_tensors(self)
        self._works = read_works(file.plan, file.metadata)
        try:
            self.stream = cuda.create_stream()
            self._multiprocessors = cuda.multiprocessors(options.device)
            self._load_kernels()
            self._load_weights()
            self._make_partials()
            self._attentions = _Attentions(file.plan, cuda, cudnn(self.stream), self.stream)
        except BaseException:
            self.close()
            raise

    def _load_kernels(self) -> None:
        cubins = self._file.cubins()
        kernels = {kernel.name: kernel for work in self._works for kernel in work.kernels}
        for name, kernel in kernels.items():
            if name not in cubins:
                raise EngineError(f"{self._file.path} lacks the kernel {name}: build it again.")
            module = self.cuda.load_module(cubins[name])
            self._modules.append(module)
            self._functions[name] = self.cuda.function(module, kernel.entry, kernel.shared)

    def _load_weights(self) -> None:
        """Read the file in pieces, each copied while the next is read."""
        size = self._file.data_size
        self._weights = self.cuda.allocate(size)
        pieces = [pinned_array(self.cuda, (min(_CHUNK, size),), np.uint8) for _ in range(2)]
        try:
            with open(self._file.path, "rb", buffering=0) as source:
                source.seek(self._file.data_offset)
                for index, start in enumerate(range(0, size, _CHUNK)):
                    piece = pieces[index % 2][: min(_CHUNK, size - start)]
                    _read_exactly(source, piece)
                    self.cuda.synchronize(self.stream)  # the copy before, from the other piece
                    address = self._weights + start
                    self.cuda.copy_in(address, piece.ctypes.data, piece.nbytes, self.stream)
            self.cuda.synchronize(self.stream)
        except OSError as error:
            raise EngineError(
                f"{self._file.path} cannot be read: {error.strerror or error}."
            ) from error

    def _make_partials(self) -> None:
        """Memory for tiles that are shared out. Marks are 0 between launches, which see to that."""
        sums, marks = partials_bytes(self._works, self._multiprocessors)
        self._partials = self.cuda.allocate(sums + marks)
        self._marks = self._partials + sums
        none = np.zeros(marks, np.uint8)
        self.cuda.copy_in(self._marks, none.ctypes.data, marks, self.stream)
        self.cuda.synchronize(self.stream)  # the array may go

    def use_device(self) -> None:
        """CUDA's current device is a matter of the thread."""
        self.cuda.use_device(self._device)

    @property
    def attentions(self) -> _Attentions:
        return self._while_open(self._attentions)

    @property
    def generation(self) -> int:
        """Counts how often the memory moved that recordings use."""
        return self._scratch.moves + self._workspace.moves

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self.lock:  # until the outputs are copied, which the next call overwrites
            if self._default is None:
                self._default = _NativeBinding(self, {})
            return {name: np.array(a) for name, a in self._default.run(inputs).items()}

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return _NativeBinding(self, resident)

    def adopt(self, binding: _NativeBinding) -> None:
        """Free a binding's device memory with the engine, at the latest.

        Raises `EngineError` where the engine was closed.
        """
        _ = self.attentions
        self._bindings.add(binding)

    def calls(self, sizes: Sizes, inputs: Mapping[str, int]) -> list[Call]:
        """What one picture takes, with its inputs and its output at these addresses.

        Where memory that recordings use has to move, `generation` counts on.
        """
        layout = lay_out(self.plan, self._works, sizes.text, sizes.image)
        self._scratch.require(layout.size)
        start = self._scratch.address
        places = {name: start + offset for name, offset in layout.offsets.items()}
        places |= {name: self._weights + t.offset for name, t in self._file.tensors.items()}
        places |= {"partials": self._partials, "marks": self._marks}
        places |= inputs
        calls = list_launches(
            self.plan, self._works, sizes, places.__getitem__, self._multiprocessors
        )
        self._workspace.require(self.attentions.prepare(calls, sizes.all))
        return calls

    def queue(self, calls: Sequence[Call], tokens: int) -> None:
        for call in calls:
            if isinstance(call, Launch):
                self.cuda.launch(
                    self._functions[call.kernel.name],
                    call.grid,
                    call.kernel.threads,
                    call.kernel.shared,
                    self.cuda.arguments(call.values),
                    self.stream,
                )
            else:
                self.attentions.queue(call, tokens, self._workspace.address)

    def close(self) -> None:
        with self.lock:
            if not self._open:
                return
            self._open = False
            # What is queued may still use the memory. A lost GPU must not keep the rest alive.
            with suppress(EngineError):
                self.use_device()
                if self.stream:
                    self.cuda.synchronize(self.stream)
            for binding in list(self._bindings):
                binding.free()
            self._default = None
            attentions, self._attentions = self._attentions, None
            if attentions is not None:
                attentions.close()
            for module in self._modules:
                with suppress(EngineError):
                    self.cuda.unload_module(module)
            for room in (self._scratch, self._workspace):
                with suppress(EngineError):
                    room.free()
            for address in (self._weights, self._partials):
                if address:
                    with suppress(EngineError):
                        self.cuda.free(address)
            if self.stream:
                with suppress(EngineError):
                    self.cuda.destroy_stream(self.stream)


def _read_exactly(source: io.FileIO, piece: NDArray[np.uint8]) -> None:
    view = piece.data.cast("B")
    while view:
        count = source.readinto(view)
        if not count:
            raise OSError("it is shorter than it was")
        view = view[count:]


def _check_tensors(engine: NativeEngine) -> None:
    """Raise `EngineError` where the manifest says other tensors than the plan has."""
    plan = engine.plan
    sizes = {name: plan.buffer(name).columns for name in ("hidden_states", "context", "velocity")}
    inputs = {
        "hidden_states": ("float32", (None, None, sizes["hidden_states"])),
        "context": ("float32", (None, None, sizes["context"])),
        "modulation": ("float32", (None, plan.modulation_rows, plan.width)),
        "rope_cos": ("float32", (None, plan.head_dim)),
        "rope_sin": ("float32", (None, plan.head_dim)),
    }
    outputs = {"velocity": ("float32", (None, None, sizes["velocity"]))}
    check_boundary(engine, inputs, outputs)
    for spec in (*engine.inputs, *engine.outputs):
        free = tuple(size for size in spec.shape if isinstance(size, str))
        if free != _FREE[spec.name]:
            raise EngineError(
                f"The manifest says that {spec.name} of {engine.component} is {list(spec.shape)}; "
                f"its free sizes must be {', '.join(_FREE[spec.name])}. Build the bundle again."
            )


_FREE = {
    "hidden_states": ("B", "L"),
    "context": ("B", "S"),
    "modulation": ("B",),
    "rope_cos": ("T",),
    "rope_sin": ("T",),
    "velocity": ("B", "L"),
}
"""How the manifest names the sizes that a plan leaves open: pictures and tokens."""


class _NativeBinding(Binding):
    """Resident inputs lie on the device; buffers and recordings stay while sizes do."""

    def __init__(self, engine: NativeEngine, resident: Mapping[str, Array]) -> None:
        self._engine = engine
        self._inputs = BoundInputs(engine, resident)
        self._addresses: dict[str, int] = {}
        self._staging: dict[str, Array] = {}
        self._outputs: dict[str, Array] = {}
        self._sizes: dict[str, int] | None = None
        self._graphs: list[int] = []
        self._generation = -1
        with engine.lock:
            engine.adopt(self)
            engine.use_device()
            for spec in self._inputs.resident:
                array = np.ascontiguousarray(resident[spec.name])
                address = engine.cuda.allocate(array.nbytes)
                self._addresses[spec.name] = address
                engine.cuda.copy_in(address, array.ctypes.data, array.nbytes, engine.stream)
                engine.cuda.synchronize(engine.stream)  # the array may go

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        engine, cuda = self._engine, self._engine.cuda
        sizes = self._inputs.check(inputs)
        if sizes["T"] != sizes["S"] + sizes["L"]:
            raise EngineError(
                f"{engine.component}: the RoPE tables have {sizes['T']} rows; "
                f"{sizes['S'] + sizes['L']} are needed, for {sizes['S']} tokens of text and "
                f"{sizes['L']} of the picture."
            )
        if not sizes["S"] or not sizes["L"]:
            raise EngineError(
                f"{engine.component}: there are {sizes['S']} tokens of text and {sizes['L']} of "
                "the picture; at least one of each is needed."
            )
        with engine.lock:
            _ = engine.attentions  # only now: another thread may have closed it
            engine.use_device()
            if sizes != self._sizes:
                self._prepare(sizes, inputs)
            for name, array in inputs.items():
                staged = self._staging[name]
                np.copyto(staged, array)
                cuda.copy_in(
                    self._addresses[name], staged.ctypes.data, staged.nbytes, engine.stream
                )
            self._queue(sizes)
            for name, array in self._outputs.items():
                cuda.copy_out(array.ctypes.data, self._addresses[name], array.nbytes, engine.stream)
            cuda.synchronize(engine.stream)
        return self._outputs

    def _prepare(self, sizes: dict[str, int], inputs: Mapping[str, Array]) -> None:
        """Make the buffers for new sizes."""
        engine = self._engine
        self._sizes = None  # half made, should anything below fail
        self._drop_graphs()
        for spec in (*self._inputs.changing, *engine.outputs):
            if (address := self._addresses.pop(spec.name, 0)) != 0:
                engine.cuda.free(address)
        for spec in self._inputs.changing:
            shape = inputs[spec.name].shape
            self._staging[spec.name] = self._buffer(spec.name, shape, spec.dtype)
        # New arrays, not the old ones resized: the caller may still look at those.
        self._outputs = {
            spec.name: self._buffer(spec.name, output_shape(spec, sizes) or (), spec.dtype)
            for spec in engine.outputs
        }
        self._sizes = sizes

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory for a tensor on the device, and an array like it on the host."""
        array = pinned_array(self._engine.cuda, shape, dtype)
        self._addresses[name] = self._engine.cuda.allocate(array.nbytes)
        return array

    def _queue(self, sizes: Mapping[str, int]) -> None:
        engine = self._engine
        if not self._graphs or self._generation != engine.generation:
            self._drop_graphs()
            self._record(sizes)
            return
        for graph in self._graphs:
            engine.cuda.launch_graph(graph, engine.stream)

    def _record(self, sizes: Mapping[str, int]) -> None:
        """Run each picture once as it is, and record it for the calls to come.

        Libraries load and allocate with their first call, which cannot be recorded. The first
        picture's calls make room for all, which have one size.
        """
        engine, cuda = self._engine, self._engine.cuda
        tokens = Sizes(sizes["S"], sizes["L"])
        self._generation = -1  # until all are there
        for picture in range(sizes["B"]):
            calls = engine.calls(tokens, self._inputs_of(picture, sizes))
            engine.queue(calls, tokens.all)
            cuda.synchronize(engine.stream)
            cuda.begin_capture(engine.stream)
            try:
                engine.queue(calls, tokens.all)
            except BaseException:
                with suppress(EngineError):
                    cuda.destroy_graph(cuda.end_capture(engine.stream))
                raise
            self._graphs.append(cuda.end_capture(engine.stream))
        self._generation = engine.generation

    def _inputs_of(self, picture: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """Where the tensors of one picture of the batch begin; tables are for all of them."""
        engine = self._engine
        found = {}
        for spec in (*engine.inputs, *engine.outputs):
            shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
            each = 0 if spec.shape[0] != "B" else int(np.prod(shape[1:])) * BYTES["f32"]
            found[spec.name] = self._addresses[spec.name] + picture * each
        return found

    def _drop_graphs(self) -> None:
        graphs, self._graphs = self._graphs, []
        for graph in graphs:
            with suppress(EngineError):
                self._engine.cuda.destroy_graph(graph)

    def free(self) -> None:
        """Free what lies on the device. Arrays that the caller holds stay."""
        self._drop_graphs()
        # At once, since the engine may be closed while another thread drops the binding.
        addresses, self._addresses = self._addresses, {}
        for address in addresses.values():
            with suppress(EngineError):
                self._engine.cuda.free(address)
        self._staging = {}
        self._outputs = {}
        self._sizes = None

    def __del__(self) -> None:
        # `cudaFree` waits for work on the memory, and takes any device's addresses.
        if hasattr(self, "_graphs"):
            self.free()
