"""What a native engine keeps while calls differ, while they fail, and after it was closed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from engines.native.plan import Linear, Packed, Part
from engines.native.run import _check_tensors as check_tensors
from fluxdeploy.errors import EngineError
from tests.engines.native.fake_gpu import FakeCudnn, FakeGpu, FakePrepared
from tests.engines.native.test_match import distance, make_inputs
from tests.engines.native.test_run import Opened, batch, open_plan
from tests.support.native_file import SMALL_PLAN, SMALL_TENSORS
from tests.support.native_plan import TYPES

SMALL, LARGE = (7, 5), (9, 30)
"""Tokens of text and of the picture."""


def random_weights() -> ir.Model:
    """What is packed as it is, and the upper half of each."""
    random = np.random.RandomState(7)
    values = []
    for name, (kind, shape) in SMALL_TENSORS.items():
        array = (random.standard_normal(shape) / 4).astype(np.float32)
        whole = array.astype(ml_dtypes.bfloat16 if kind == "f32" else TYPES[kind])
        for key, each in ((name, whole), (f"{name}/2", whole[: len(whole) // 2])):
            values.append(ir.val(key, const_value=ir.tensor(each, name=key)))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


MODEL = random_weights()
PLAN = replace(
    SMALL_PLAN,
    packed=tuple(
        Packed(name, shape, kind, (Part(name),)) for name, (kind, shape) in SMALL_TENSORS.items()
    ),
)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Opened]:
    with open_plan(PLAN, MODEL, tmp_path) as opened:
        yield opened


def pictures(sizes: tuple[int, int], number: int = 1) -> list[dict[str, Any]]:
    made = [make_inputs(PLAN, *sizes) for _ in range(number)]
    for index, each in enumerate(made):
        each["hidden_states"] = np.roll(each["hidden_states"], index, 0)
    return made


def is_right(run: Opened, found: Any, given: list[dict[str, Any]]) -> bool:
    """As near as the steps of 8 bits are, which fall a little otherwise where sums do."""
    return len(found) == len(given) and all(
        distance(one, run.expected(each)) < 0.02 for one, each in zip(found, given, strict=True)
    )


def check_run(run: Opened, runner: Any, sizes: tuple[int, int], number: int = 1) -> None:
    given = pictures(sizes, number)
    assert is_right(run, runner.run(batch(given))["velocity"], given)


def test_bindings_of_several_sizes_take_turns(run: Opened) -> None:
    """A larger one moves the memory that the recordings of a smaller one name."""
    small, large = run.engine.bind({}), run.engine.bind({})
    for runner, sizes in ((small, SMALL), (large, LARGE), (small, SMALL), (large, LARGE)):
        check_run(run, runner, sizes)
    assert run.gpu.calls["launch_graph"] == 1
    check_run(run, small, SMALL)
    assert run.gpu.calls["launch_graph"] == 2


def test_the_workspace_of_attention_moves_too(run: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for the activations."""

    def prepare(self: FakeCudnn, kind: Any, tokens: int, *others: Any) -> FakePrepared:
        made = plain(self, kind, tokens, *others)
        made.workspace = 1000 if tokens == sum(LARGE) else 2000
        return made

    plain = FakeCudnn.prepare
    monkeypatch.setattr(FakeCudnn, "prepare", prepare)
    small, large = run.engine.bind({}), run.engine.bind({})
    for runner, sizes in ((large, LARGE), (small, SMALL), (large, LARGE)):
        check_run(run, runner, sizes)
    assert run.gpu.calls["launch_graph"] == 0


def test_batches_change_their_size(run: Opened) -> None:
    for number in (2, 1, 3, 3):
        check_run(run, run.engine, SMALL, number)
    assert run.gpu.calls["launch_graph"] == 3


def test_a_batch_of_none_has_no_result(run: Opened) -> None:
    given = batch(pictures(SMALL))
    none = {name: a if name.startswith("rope") else a[:0] for name, a in given.items()}
    assert run.engine.run(none)["velocity"].shape == (0, SMALL[1], 16)


@pytest.mark.parametrize("method", ["allocate", "prepare"])
def test_a_picture_without_memory_for_it_leaves_the_others_right(
    run: Opened, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What it freed in order to grow, recordings before it must not use."""
    small, large = run.engine.bind({}), run.engine.bind({})
    check_run(run, small, SMALL)
    # Room for its inputs and output, and for no more; or for all but the workspace.
    size = 9000 if method == "allocate" else 1 << 20
    with monkeypatch.context() as patch:
        patch.setattr(run.gpu, "memory", size)
        if method == "prepare":
            patch.setattr(FakePrepared, "__init__", huge(FakePrepared.__init__))
        for _ in range(2):
            with pytest.raises(EngineError, match="out of memory"):
                large.run(batch(pictures(LARGE)))
        if method == "allocate":
            patch.setattr(run.gpu, "memory", 1 << 20)
            check_run(run, small, SMALL)
    check_run(run, small, SMALL)
    assert run.gpu.calls["launch_graph"] == (1 if method == "allocate" else 0)


def huge(plain: Any) -> Any:
    def make(self: FakePrepared, *given: Any) -> None:
        plain(self, *given)
        self.workspace = 1 << 30

    return make


def test_half_a_batch_that_was_recorded_is_recorded_again(
    run: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_run(run, run.engine, LARGE)  # no memory moves after this
    with monkeypatch.context() as patch:
        patch.setattr(FakeGpu, "end_capture", failing(FakeGpu.end_capture, 1))
        with pytest.raises(Told):
            check_run(run, run.engine, SMALL, 2)
    check_run(run, run.engine, SMALL, 2)


@pytest.mark.parametrize("shape", [("B", 7, 16), ("B", "L", 16)])
def test_a_manifest_with_other_free_sizes_is_refused(
    run: Opened, shape: tuple[int | str, ...]
) -> None:
    specs = [
        replace(spec, shape=shape) if spec.name == "context" else spec for spec in run.engine.inputs
    ]
    run.engine.inputs = tuple(specs)
    with pytest.raises(EngineError, match=r"context of transformer is .* must be B, S"):
        check_tensors(run.engine)


METHODS = (
    *("create_stream", "load_module", "function", "allocate", "allocate_host", "synchronize"),
    *("copy_in", "copy_out", "launch", "begin_capture", "end_capture", "launch_graph"),
)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_where_a_call_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One of the first calls of CUDA, or a later one; the next run after it is right again."""
    gpus: list[FakeGpu] = []
    for number in (0, 1, 2, 5, 9):
        with monkeypatch.context() as patch:
            patch.setattr(FakeGpu, "__init__", remembering(gpus, FakeGpu.__init__))
            patch.setattr(FakeGpu, method, failing(getattr(FakeGpu, method), number))
            with suppress(Told), open_plan(PLAN, MODEL, tmp_path) as run:
                for _ in range(2):
                    with suppress(Told):
                        check_run(run, run.engine, SMALL, 2)
                check_run(run, run.engine, SMALL, 2)
    gc.collect()
    for gpu in gpus:
        left = gpu.device, gpu.host, gpu.streams, gpu.modules, gpu.graphs, gpu.handles
        assert not any(left)


class Told(EngineError):
    """A failure that a test wants."""


def failing(plain: Any, number: int) -> Any:
    """A method of which one call fails."""
    calls = count()

    def call(*given: Any) -> Any:
        if next(calls) == number:
            raise Told("It failed, as it was told to.")
        return plain(*given)

    return call


def remembering(gpus: list[FakeGpu], plain: Any) -> Any:
    def make(self: FakeGpu, *given: Any) -> None:
        plain(self, *given)
        gpus.append(self)

    return make


def test_threads_get_their_own_results(run: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own outputs are copied before the next call overwrites them."""
    one, other = pictures(SMALL, 2)
    run.engine.run(batch([one]))
    found: list[None] = []
    thread = threading.Thread(target=lambda: run.engine.run(batch([other])))
    plain = np.array

    def slow(array: Any, *given: Any, **named: Any) -> Any:
        if array.shape == (1, SMALL[1], 16) and not found:
            found.append(None)
            thread.start()
            thread.join(0.2)
        return plain(array, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr("engines.native.run.np.array", slow)
        result = run.engine.run(batch([one]))["velocity"]
        thread.join()
    assert found
    assert is_right(run, result, [one])


def test_a_closed_engine_is_told(run: Opened) -> None:
    binding = run.engine.bind({})
    check_run(run, binding, SMALL)
    run.engine.close()
    run.engine.close()
    given = batch(pictures(SMALL))
    for call in (binding.run, run.engine.run, run.engine.bind):
        with pytest.raises(EngineError, match="the engine was closed"):
            call(given)


@pytest.mark.parametrize("sizes", [(0, 5), (7, 0)])
def test_no_tokens_are_refused(run: Opened, sizes: tuple[int, int]) -> None:
    with pytest.raises(EngineError, match=rf"{sizes[0]} tokens of text and {sizes[1]} of"):
        run.engine.run(batch(pictures(sizes)))


@pytest.mark.parametrize("context", [6, 8])
def test_a_context_that_the_tables_are_not_for_is_refused(run: Opened, context: int) -> None:
    given = batch(pictures(SMALL))
    given["context"] = np.zeros((1, context, PLAN.width), np.float32)
    with pytest.raises(EngineError, match=f"12 rows; {context + 5} are needed"):
        run.engine.run(given)


def test_streams_that_differ_share_no_tile(tmp_path: Path) -> None:
    """Also where both have the same weights."""
    *steps, residual, last = PLAN.steps
    assert isinstance(residual, Linear)
    assert residual.gate[0] != residual.gate[1]
    steps += [replace(residual, grouped=False), last]
    packed = [
        replace(each, shape=(each.shape[0] // 2, *each.shape[1:]), parts=(Part(f"{each.name}/2"),))
        if each.name.startswith("out.")
        else each
        for each in PLAN.packed
    ]
    plan = replace(PLAN, steps=tuple(steps), packed=tuple(packed))
    with open_plan(plan, MODEL, tmp_path) as run:
        check_run(run, run.engine, SMALL)
