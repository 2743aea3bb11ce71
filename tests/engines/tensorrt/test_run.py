"""Running TensorRT engines: profiles, buffers, bindings, closing. On a pretended GPU."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engines import EngineOptions
from engines.cuda import Cuda, pinned_array
from engines.gpu import has_nvidia_driver
from engines.tensorrt.run import Scratch, TensorRtEngine
from fluxdeploy.errors import EngineError
from tests.engines.conftest import arrays, engine_record, expected, record
from tests.engines.tensorrt.fake_gpu import FakeCuda, FakeLoaded, profile

WIDE = profile((1, 1, 8), (1, 2, 16))
NARROW = profile((1, 2, 2), (2, 3, 4))


class Machine:
    """A pretended GPU and the engines on it."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.scratch = Scratch(self.cuda)

    def open(
        self, *profiles: Any, scratch: int = 1000, device: int = 0
    ) -> tuple[TensorRtEngine, FakeLoaded]:
        loaded = FakeLoaded(self.cuda, *(profiles or (WIDE,)), scratch=scratch)
        made = engine_record("tensorrt-rtx", "sm89")
        fake: Any = loaded
        options = EngineOptions(device=device)
        engine = TensorRtEngine("tiny", record(made), made, fake, self.cuda, self.scratch, options)
        return engine, loaded


@pytest.fixture
def machine() -> Machine:
    return Machine()


def split(inputs: dict[str, Any], *resident: str) -> tuple[dict[str, Any], dict[str, Any]]:
    placed = {name: array for name, array in inputs.items() if name in resident}
    return placed, {name: array for name, array in inputs.items() if name not in resident}


def right(result: Mapping[str, Any], inputs: dict[str, Any]) -> bool:
    return bool((result["y"] == expected(**inputs)).all())


@pytest.mark.parametrize("resident", [(), ("scale",), ("scale", "ids"), ("x", "scale", "ids")])
def test_bindings_and_runs(machine: Machine, resident: tuple[str, ...]) -> None:
    engine, _ = machine.open()
    inputs = arrays()
    placed, changing = split(inputs, *resident)
    binding = engine.bind(placed)
    for _ in range(4):
        assert right(binding.run(changing), inputs)
    assert right(engine.run(inputs), inputs)
    assert right(binding.run(changing), inputs), "after another one used the engine"


def test_all_is_done_on_the_gpu_that_was_asked_for(machine: Machine) -> None:
    """CUDA's current device is a matter of the thread, and every call may be another's."""
    engine, _ = machine.open(device=1)
    inputs = arrays()
    placed, changing = split(inputs, "scale")
    machine.cuda.used.clear()
    with ThreadPoolExecutor() as first, ThreadPoolExecutor() as second:
        binding = first.submit(engine.bind, placed).result()
        assert right(second.submit(binding.run, changing).result(), inputs)
    with ThreadPoolExecutor() as third:
        third.submit(engine.close).result()
    assert machine.cuda.used == {1}


def test_resident_inputs_are_the_bindings_own(machine: Machine) -> None:
    """The copy is done when `bind` returns: what the caller does with the array changes nothing."""
    engine, _ = machine.open()
    inputs = arrays()
    answer = expected(**inputs)
    placed, changing = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    placed["scale"][:] = np.nan
    assert (binding.run(changing)["y"] == answer).all()


def test_resident_inputs_are_uploaded_once(machine: Machine) -> None:
    engine, _ = machine.open()
    inputs = arrays()
    placed, changing = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    assert machine.cuda.calls["copy_in"] == 2
    placed["scale"][:] = np.nan
    for count in (3, 4):
        result = binding.run(changing)
        assert machine.cuda.calls["copy_in"] == count
    assert np.isfinite(result["y"]).all()


def test_outputs_of_a_binding_are_reused_and_those_of_a_run_are_not(machine: Machine) -> None:
    engine, _ = machine.open()
    placed, changing = split(arrays(), "scale", "ids")
    binding = engine.bind(placed)
    first = binding.run(changing)["y"]
    assert binding.run({"x": changing["x"] + 1})["y"] is first
    one, other = (engine.run(arrays())["y"] for _ in range(2))
    assert not np.shares_memory(one, other)


def test_outputs_outlive_the_engine(machine: Machine) -> None:
    engine, _ = machine.open()
    inputs = arrays()
    result = engine.bind({}).run(inputs)
    engine.close()
    gc.collect()
    assert right(result, inputs)
    assert len(machine.cuda.host) == 1, "page-locked memory stays while an array is held"
    del result
    gc.collect()
    assert not machine.cuda.host


def test_shapes_may_change_between_calls(machine: Machine) -> None:
    engine, loaded = machine.open(NARROW, WIDE)
    inputs = arrays(2, 3)
    placed, _ = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    for tokens in (3, 3, 3, 7, 1, 7, 7, 7):
        x = arrays(2, tokens, seed=tokens)["x"]
        result = binding.run({"x": x})
        assert right(result, {"x": x, **placed})
        assert loaded.active == (0 if tokens == 3 else 1)
    shapes = loaded.calls["set_shape"]
    binding.run({"x": x})
    assert loaded.calls["set_shape"] == shapes, "nothing is set again for the same shapes"


@pytest.mark.parametrize("order", [(WIDE, NARROW), (NARROW, WIDE)])
def test_the_narrowest_profile_is_taken(machine: Machine, order: tuple[Any, ...]) -> None:
    engine, loaded = machine.open(*order)
    for batch, tokens, best in ((1, 2, NARROW), (2, 4, NARROW), (2, 5, WIDE), (3, 4, WIDE)):
        inputs = arrays(batch, tokens)
        assert right(engine.run(inputs), inputs)
        assert order[loaded.active] is best


def test_sizes_between_the_profiles_are_refused(machine: Machine) -> None:
    engine, _ = machine.open(NARROW, profile((1, 1, 1), (8, 8, 8)))
    with pytest.raises(EngineError, match=r"no resolution bucket .* x \[1, 6, 4\].*\[1, 8, 4\]"):
        engine.run(arrays(1, 6))
    with pytest.raises(EngineError, match="dimension T is 17; this engine takes 1 to 16"):
        engine.run(arrays(1, 17))
    assert right(engine.run(arrays(1, 8)), arrays(1, 8)), "still usable"


def test_engines_share_one_scratch_block(machine: Machine) -> None:
    """A block that grows takes a new address: the others must follow."""
    small, _ = machine.open(scratch=100)
    inputs = arrays()
    for _ in range(3):
        assert right(small.run(inputs), inputs)
    blocks = len(machine.cuda.device)
    large, _ = machine.open(scratch=5000)
    assert right(large.run(inputs), inputs)
    assert len(machine.cuda.device) == 2 * blocks - 1, "four buffers each, and one scratch block"
    assert right(small.run(inputs), inputs)
    generation = machine.scratch.generation
    small.close()
    assert right(large.run(inputs), inputs)
    assert machine.scratch.generation == generation, "the block stays while an engine needs it"
    large.close()
    assert not machine.cuda.device


def test_bindings_take_turns(machine: Machine) -> None:
    engine, _ = machine.open(NARROW, WIDE)
    made = [(engine.bind({}), arrays(2, tokens, seed=tokens)) for tokens in (3, 9, 9)]
    for turns in (1, 3, 1):
        for binding, inputs in made:
            for _ in range(turns):
                assert right(binding.run(inputs), inputs)


def test_a_failed_run_leaves_the_engine_usable(machine: Machine) -> None:
    engine, loaded = machine.open()
    inputs = arrays()
    assert right(engine.run(inputs), inputs)
    loaded.fails = True
    with pytest.raises(EngineError, match="failed while it ran"):
        engine.run(inputs)
    loaded.fails = False
    for _ in range(3):
        assert right(engine.run(inputs), inputs)


def test_old_sizes_after_new_ones_that_failed(machine: Machine) -> None:
    engine, _ = machine.open()
    inputs = arrays(2, 3)
    binding = engine.bind({})
    assert right(binding.run(inputs), inputs)
    machine.cuda.memory = 50
    with pytest.raises(EngineError, match="out of memory"):
        binding.run(arrays(8, 16))
    machine.cuda.memory = 1 << 40
    assert right(binding.run(inputs), inputs)


def test_out_of_memory_while_buffers_are_made(machine: Machine) -> None:
    engine, _ = machine.open()
    machine.cuda.memory = 50
    with pytest.raises(EngineError, match="out of memory"):
        engine.run(arrays(8, 16))
    machine.cuda.memory = 1 << 40
    assert right(engine.run(arrays(8, 16)), arrays(8, 16))
    engine.close()
    assert not machine.cuda.device


def test_bad_tensors(machine: Machine) -> None:
    engine, _ = machine.open()
    placed, changing = split(arrays(), "scale", "ids")
    with pytest.raises(EngineError, match="tensor z is not one of its inputs"):
        engine.bind(placed | {"z": np.zeros(1, np.float32)})
    binding = engine.bind(placed)
    with pytest.raises(EngineError, match=r"x has shape \[3, 3, 4\]; \[2, 'T', 4\] is"):
        binding.run({"x": np.zeros((3, 3, 4), np.float32)})
    with pytest.raises(EngineError, match="x is float16; float32 is needed"):
        binding.run({"x": changing["x"].astype(np.float16)})
    strided = np.asfortranarray(changing["x"])
    assert right(binding.run({"x": strided}), placed | changing)


def test_an_engine_with_other_tensors_is_refused(machine: Machine) -> None:
    loaded: Any = FakeLoaded(machine.cuda, WIDE)
    loaded.tensors["x"] = "float16"
    made = engine_record("tensorrt-rtx", "sm89")
    with pytest.raises(EngineError, match=r"'x': 'float16'.*the manifest says.*'x': 'float32'"):
        TensorRtEngine(
            "tiny", record(made), made, loaded, machine.cuda, machine.scratch, EngineOptions()
        )
    assert loaded.closed


def test_bindings_free_their_memory_when_they_go(machine: Machine) -> None:
    """A host makes one for each picture, for days."""
    engine, _ = machine.open()
    inputs = arrays()
    counts = []
    for _ in range(3):
        binding = engine.bind({})
        for _ in range(3):
            binding.run(inputs)
        del binding
        gc.collect()
        counts.append((len(machine.cuda.device), len(machine.cuda.host)))
    assert counts == [(1, 0)] * 3, "only the scratch block is left"


def test_closing_frees_everything(machine: Machine) -> None:
    engine, loaded = machine.open()
    inputs = arrays()
    placed, changing = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    for _ in range(3):
        binding.run(changing)
        engine.run(inputs)
    engine.close()
    engine.close()
    assert loaded.closed
    assert not machine.cuda.device
    assert not machine.cuda.streams
    for call in (
        lambda: engine.run(inputs),
        lambda: engine.bind(placed),
        lambda: binding.run(changing),
    ):
        with pytest.raises(EngineError, match="tiny: the engine was closed"):
            call()


def test_pinned_arrays_are_arrays_of_their_type(machine: Machine) -> None:
    for shape, dtype in (((2, 3), "float32"), ((0, 4), "float32"), ((), "int32")):
        array = pinned_array(machine.cuda, shape, dtype)
        array[...] = 7
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_without_a_driver_cuda_says_so() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    if not has_nvidia_driver():
        with pytest.raises(EngineError, match="cudaGetDeviceCount failed: "):
            Cuda().device_count()
