"""Reading engines and calling the library, which is pretended here: it needs a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.tensorrt import loaded as module
from engines.tensorrt.loaded import LoadedEngine, load_engine
from fluxdeploy.errors import EngineError
from tests.engines.tensorrt.fake_gpu import FakeCuda


class Library:
    """As much of `tensorrt_rtx` as a loaded engine needs. `events` is what happened."""

    def __init__(self) -> None:
        library = self
        self.events: list[Any] = []
        self.valid = True
        self.readable = True
        self.streamable = 0
        self.refuses = ""
        self.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2})
        self.IStreamReaderV2 = type("IStreamReaderV2", (), {"__init__": self._start_reader})
        self.SeekPosition = SimpleNamespace(SET="set", CUR="cur", END="end")
        self.EngineValidity = SimpleNamespace(INVALID="invalid")
        self.TensorIOMode = SimpleNamespace(INPUT="in")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

        class Runtime:
            engine_header_size = 4

            def __init__(self, logger: Any) -> None:
                self.logger = library.logger = logger
                if library.refuses == "runtime":
                    logger.log(1, "CUDA initialization failure with error: 35")
                if library.refuses in ("runtime", "runtime in silence"):
                    raise TypeError("pybind11::init(): factory function returned nullptr")

            def get_engine_validity(self, header: bytes) -> tuple[str, int]:
                library.events.append(("header", header))
                return ("valid" if library.valid else "invalid"), 0

            def deserialize_cuda_engine(self, reader: Any) -> Any:
                if not library.readable:
                    self.logger.log(2, "only a warning")
                    self.logger.log(1, "magic tag  does not match\n")
                    return None
                data = reader.read(6, 0)
                assert reader.seek(2, "cur")
                while piece := reader.read(1 << 40, 0):
                    data += piece
                assert reader.seek(-1, "end")
                assert reader.read(5, 0) == data[-1:]
                library.events.append(data)
                return Engine()

            def __del__(self) -> None:
                library.events.append("runtime gone")

        class Engine:
            num_io_tensors = 2
            num_optimization_profiles = 2
            streamable_weights_size = self.streamable
            weight_streaming_budget_v2 = None

            def __init__(self) -> None:
                self.streamable_weights_size = library.streamable
                library.engine = self

            def get_weight_streaming_automatic_budget(self) -> int:
                return 123

            def get_tensor_name(self, index: int) -> str:
                return ("x", "y")[index]

            def get_tensor_mode(self, name: str) -> str:
                return "in" if name == "x" else "out"

            def get_tensor_dtype(self, name: str) -> str:
                return "f"

            def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
                assert name == "x"
                return [[1, 4], [2, 4], [3 + index, 4]]

            def create_execution_context(self, strategy: str) -> Any:
                library.events.append(strategy)
                return None if library.refuses == "context" else Context()

            def __del__(self) -> None:
                library.events.append("engine gone")

        class Context:
            active_optimization_profile = 0

            def set_optimization_profile_async(self, index: int, stream: int) -> bool:
                library.events.append(("profile", index, stream))
                return True

            def set_input_shape(self, name: str, shape: Any) -> bool:
                return library.refuses != "shape"

            def execute_async_v3(self, stream: int) -> bool:
                return library.refuses != "run"

            def __del__(self) -> None:
                library.events.append("context gone")

        self.Runtime = Runtime
        self.engine: Any = None
        self.logger: Any = None

    def _start_reader(self, reader: Any) -> None:
        if self.refuses == "reader":
            raise RuntimeError("[ERROR] Failed to open cuda driver.")

    def nptype(self, kind: str) -> Any:
        return np.float32


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_CHUNK", 1000)
    made = tmp_path / "tiny.engine"
    made.write_bytes(os.urandom(4096))
    return made


def load(library: Library, path: Path, memory: int = 1 << 40) -> LoadedEngine:
    cuda = FakeCuda()
    cuda.memory = memory
    return load_engine(library, cuda, path, "tiny")


def test_an_engine_is_read_in_pieces(library: Library, path: Path) -> None:
    loaded = load(library, path)
    data = path.read_bytes()
    assert ("header", data[:4]) in library.events
    assert data[:6] + data[8:] in library.events
    assert "user" in library.events, "scratch memory is the caller's"
    assert loaded.tensors == {"x": "float32", "y": "float32"}
    assert [profile["x"][2] for profile in loaded.profiles] == [(3, 4), (4, 4)]
    assert loaded.profiles[0]["x"] == ((1, 4), (2, 4), (3, 4))
    loaded.set_profile(0, 7)
    loaded.set_profile(1, 7)
    assert [e for e in library.events if e[0] == "profile"] == [("profile", 1, 7)]


def test_things_go_in_their_order(library: Library, path: Path) -> None:
    loaded = load(library, path)
    library.engine = None
    loaded.close()
    loaded.close()
    assert library.events[-3:] == ["context gone", "engine gone", "runtime gone"]


@pytest.mark.parametrize(("memory", "budget"), [(1 << 40, None), (1 << 30, 123)])
def test_weights_are_streamed_where_they_do_not_fit(
    library: Library, path: Path, memory: int, budget: int | None
) -> None:
    library.streamable = 1 << 20
    load(library, path, memory=memory)
    assert library.engine.weight_streaming_budget_v2 == budget


def test_what_cannot_be_opened(library: Library, path: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot open tiny \(.*missing.engine\): No such file"):
        load(library, tmp_path / "missing.engine")
    library.readable = False
    with pytest.raises(EngineError, match=r"tiny.engine\): magic tag does not match\."):
        load(library, path)
    library.valid = False
    library.events.clear()
    with pytest.raises(EngineError, match="not valid on this GPU with this version"):
        load(library, path)
    assert ("header", path.read_bytes()[:4]) in library.events


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        ("runtime", r"tiny.engine\): CUDA initialization failure with error: 35\.$"),
        ("runtime in silence", r"tiny.engine\): it does not start: look at the NVIDIA driver"),
        ("reader", r"cannot open tiny \(.*tiny.engine\): \[ERROR\] Failed to open cuda driver\.$"),
    ],
)
def test_exceptions_of_the_bindings(library: Library, path: Path, refuses: str, words: str) -> None:
    library.refuses = refuses
    with pytest.raises(EngineError, match=words):
        load(library, path)


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        ("context", "tiny: TensorRT cannot make an execution context: it gives no reason"),
        ("shape", r"tiny: TensorRT refuses shape \[5\] of x"),
        ("run", "tiny: TensorRT failed while it ran"),
    ],
)
def test_refusals_of_the_library(library: Library, path: Path, refuses: str, words: str) -> None:
    library.refuses = refuses

    def use() -> None:
        loaded = load(library, path)
        loaded.set_shape("x", (5,))
        loaded.enqueue(1)

    with pytest.raises(EngineError, match=words):
        use()


def test_a_reason_is_given_once(library: Library, path: Path) -> None:
    loaded = load(library, path)
    library.refuses = "shape"
    library.logger.log(1, "too large")
    with pytest.raises(EngineError, match=r"refuses shape \[5\] of x: too large\.$"):
        loaded.set_shape("x", (5,))
    with pytest.raises(EngineError, match=r"it gives no reason\.$"):
        loaded.set_shape("x", (5,))
