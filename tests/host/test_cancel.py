"""A cancelled token ends its own calls and no others, wherever they are."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fluxdeploy
from engines.base import Array, Binding
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, Manifest
from fluxdeploy.errors import Cancelled
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.turns import Demand, Turns
from tests.host.conftest import COMPONENTS, CharacterTokenizers, MemoryEngine

LIMIT = 20
"""Seconds after which a test that hangs gives up."""


class WatchedToken(CancelToken):
    """Says when its call waits for its turn; cancelling it then finds it waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def check(self, where: str) -> None:
        super().check(where)
        if where == "while it waited for its turn":
            # Under the lock that waiting releases, and that cancelling takes.
            self.waits.set()


class Gate:
    """Holds up the first run of an engine after `skip` others, until it is opened."""

    def __init__(self, engine: MemoryEngine, skip: int = 0) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        compute, passed = engine.compute, iter(range(skip))

        def gated(inputs: Mapping[str, Array]) -> dict[str, Array]:
            if next(passed, None) is None and not self.reached.is_set():
                self.reached.set()
                assert self.open.wait(LIMIT)
            return compute(inputs)

        engine.compute = gated


def make(pipe: FluxPipeline, seed: int, **options: Any) -> np.ndarray:
    options = {"prompt": f"fox {seed}", "num_images_per_prompt": 2, **options}
    images = pipe(seed=seed, max_sequence_length=16, output_type="np", **options).images
    assert isinstance(images, np.ndarray)
    return images


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


STAGES = [
    pytest.param("clip", 0, "before the t5 ran", id="between the encoders"),
    pytest.param("t5", 0, "before the conditioner ran", id="encoding"),
    pytest.param("conditioner", 0, "before the first step", id="before the first step"),
    pytest.param("transformer", 1, "after 2 of 3 steps", id="denoising"),
    pytest.param("transformer", 2, "before decoding picture 1 of 2", id="before decoding"),
    pytest.param("vae_decoder", 0, "before decoding picture 2 of 2", id="decoding"),
]


@pytest.mark.parametrize(("component", "skip", "where"), STAGES)
def test_the_running_call_is_cancelled_and_the_waiting_one_is_not(
    component: str,
    skip: int,
    where: str,
    pipe: FluxPipeline,
    engines: dict[str, MemoryEngine],
    threads: ThreadPoolExecutor,
) -> None:
    expected = make(pipe, 2)
    gate, running, waiting = Gate(engines[component], skip), CancelToken(), WatchedToken()
    first = threads.submit(make, pipe, 1, cancel=running)
    assert gate.reached.wait(LIMIT)
    second = threads.submit(make, pipe, 2, cancel=waiting)
    assert waiting.waits.wait(LIMIT)
    running.cancel()
    gate.open.set()
    with pytest.raises(Cancelled, match=f"^Cancelled {where}; no picture was made.$"):
        first.result(LIMIT)
    np.testing.assert_array_equal(second.result(LIMIT), expected)


@pytest.mark.parametrize(("component", "skip", "where"), STAGES)
def test_a_waiting_call_ends_at_once_and_the_running_one_goes_on(
    component: str,
    skip: int,
    where: str,
    pipe: FluxPipeline,
    engines: dict[str, MemoryEngine],
    threads: ThreadPoolExecutor,
) -> None:
    expected = make(pipe, 1), make(pipe, 3)
    engines_forgotten(pipe)
    gate, tokens = Gate(engines[component], skip), [WatchedToken(), WatchedToken()]
    running = threads.submit(make, pipe, 1, cancel=CancelToken())
    assert gate.reached.wait(LIMIT)
    cancelled = threads.submit(make, pipe, 2, cancel=tokens[0])
    assert tokens[0].waits.wait(LIMIT)
    behind = threads.submit(make, pipe, 3, cancel=tokens[1])
    assert tokens[1].waits.wait(LIMIT)
    tokens[0].cancel()
    with pytest.raises(Cancelled, match="while it waited for its turn"):
        cancelled.result(LIMIT)
    assert not running.done()
    gate.open.set()
    np.testing.assert_array_equal(running.result(LIMIT), expected[0])
    np.testing.assert_array_equal(behind.result(LIMIT), expected[1])


def engines_forgotten(pipe: FluxPipeline) -> None:
    """Let the prompts be encoded again, so that a gate in an encoder is reached."""
    pipe._encoder.forget()


def test_a_token_that_several_calls_share_ends_them_all(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], threads: ThreadPoolExecutor
) -> None:
    gate, token = Gate(engines["transformer"]), WatchedToken()
    calls = [threads.submit(make, pipe, 1, cancel=token)]
    assert gate.reached.wait(LIMIT)
    calls.append(threads.submit(make, pipe, 2, cancel=token))
    assert token.waits.wait(LIMIT)
    token.cancel()
    with pytest.raises(Cancelled, match="while it waited"):
        calls[1].result(LIMIT)
    gate.open.set()
    with pytest.raises(Cancelled, match="after 1 of 3 steps"):
        calls[0].result(LIMIT)


def test_calls_are_served_in_the_order_of_coming(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], threads: ThreadPoolExecutor
) -> None:
    gate, order = Gate(engines["t5"]), list[int]()

    def note(number: int) -> Callable[..., None]:
        return lambda pipe, step, *rest: order.append(number) if step == 0 else None

    calls: list[Future[np.ndarray]] = []
    for number in range(4):
        token = WatchedToken()
        calls.append(
            threads.submit(make, pipe, number, cancel=token, callback_on_step_end=note(number))
        )
        assert (gate.reached if number == 0 else token.waits).wait(LIMIT)
    gate.open.set()
    for call in calls:
        call.result(LIMIT)
    assert order == [0, 1, 2, 3]


def test_who_has_had_a_turn_goes_behind_who_waits(threads: ThreadPoolExecutor) -> None:
    turns, order, waiting = Turns(), list[str](), WatchedToken()

    def wait() -> None:
        with turns.taken(waiting, Demand()):
            order.append("who waited")

    with turns.taken(CancelToken(), Demand()):
        other = threads.submit(wait)
        assert waiting.waits.wait(LIMIT)
    with turns.taken(CancelToken(), Demand()):
        order.append("who came again")
    other.result(LIMIT)
    assert order == ["who waited", "who came again"]


def test_a_token_cancelled_before_the_call_begins_runs_nothing(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    token = CancelToken()
    token.cancel()
    token.cancel()
    assert token.cancelled
    with pytest.raises(Cancelled, match="before it began"):
        make(pipe, 1, cancel=token)
    assert not any(engine.runs for engine in engines.values())
    assert make(pipe, 1, cancel=CancelToken()).shape == (2, 32, 48, 3)


def test_cancelling_after_the_call_is_harmless(pipe: FluxPipeline) -> None:
    token = CancelToken()
    images = make(pipe, 1, cancel=token)
    token.cancel()
    np.testing.assert_array_equal(make(pipe, 1), images)


@pytest.mark.parametrize(
    ("last", "where"), [(1, "after 2 of 3 steps"), (2, "before decoding picture 1 of 2")]
)
def test_a_callback_cancels_its_own_call(
    last: int, where: str, pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    token = CancelToken()

    def stop(caller: FluxPipeline, step: int, timestep: float, state: object) -> None:
        if step == last:
            token.cancel()

    with pytest.raises(Cancelled, match=where):
        make(pipe, 1, cancel=token, callback_on_step_end=stop)
    assert len(engines["transformer"].runs) == last + 1
    assert not engines["vae_decoder"].runs
    assert make(pipe, 1).shape == (2, 32, 48, 3)


def test_cancelling_while_the_transformer_takes_its_inputs_makes_no_step(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    token, bind = CancelToken(), engines["transformer"].bind

    def cancelling(resident: Mapping[str, Array]) -> Binding:
        token.cancel()
        return bind(resident)

    monkeypatch.setattr(engines["transformer"], "bind", cancelling)
    with pytest.raises(Cancelled, match="after 0 of 3 steps"):
        make(pipe, 1, cancel=token)
    assert not engines["transformer"].runs


def test_with_low_vram_a_cancelled_call_does_not_open_the_transformer(manifest: Manifest) -> None:
    opened: list[str] = []
    token = CancelToken()

    def open_component(name: str) -> MemoryEngine:
        opened.append(name)
        if name == "conditioner":
            token.cancel()
        return MemoryEngine(name, COMPONENTS[name])

    record = ComponentRecord(
        "", "fp32", "fp32", (), (), (), (EngineRecord("memory", "1", "cpu", "", {}),), None
    )
    components = dict.fromkeys(COMPONENTS, record)
    bundle = SimpleNamespace(manifest=dataclasses.replace(manifest, components=components))
    pipe = FluxPipeline(bundle, CharacterTokenizers(), open_component, low_vram=True)  # type: ignore[arg-type]
    with pytest.raises(Cancelled, match="before the conditioner ran"):
        make(pipe, 1, cancel=token)
    assert opened == ["clip", "t5", "conditioner"]


def test_a_cancelled_call_opens_no_further_engine(manifest: Manifest) -> None:
    opened: list[str] = []
    token = CancelToken()

    def open_component(name: str) -> MemoryEngine:
        opened.append(name)
        token.cancel()
        return MemoryEngine(name, COMPONENTS[name])

    bundle = SimpleNamespace(manifest=manifest)
    pipe = FluxPipeline(bundle, CharacterTokenizers(), open_component)  # type: ignore[arg-type]
    with pytest.raises(Cancelled, match="before the transformer was opened"):
        make(pipe, 1, cancel=token)
    assert opened == ["vae_decoder"]


def test_a_callback_may_make_another_picture_and_close_the_pipeline(pipe: FluxPipeline) -> None:
    plain, inner = make(pipe, 1), make(pipe, 2)
    outer, cancelled = CancelToken(), CancelToken()
    cancelled.cancel()

    def nest(caller: FluxPipeline, step: int, timestep: float, state: object) -> None:
        with pytest.raises(Cancelled, match="before it began"):
            make(caller, 2, cancel=cancelled)
        np.testing.assert_array_equal(make(caller, 2), inner)

    np.testing.assert_array_equal(make(pipe, 1, cancel=outer, callback_on_step_end=nest), plain)

    class StoppedError(Exception):
        pass

    def close(caller: FluxPipeline, step: int, timestep: float, state: object) -> None:
        caller.close()
        raise StoppedError

    with pytest.raises(StoppedError):
        make(pipe, 1, callback_on_step_end=close)


def test_closing_waits_for_the_running_call(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], threads: ThreadPoolExecutor
) -> None:
    expected, gate = make(pipe, 1), Gate(engines["transformer"], 1)
    running = threads.submit(make, pipe, 1)
    assert gate.reached.wait(LIMIT)
    closing = threads.submit(pipe.close)
    gate.open.set()
    np.testing.assert_array_equal(running.result(LIMIT), expected)
    closing.result(LIMIT)
    assert all(engine.closed for engine in engines.values())


def test_the_token_is_public() -> None:
    assert fluxdeploy.CancelToken is CancelToken
