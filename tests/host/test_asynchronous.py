"""The pipeline on asyncio: awaited calls, their events, and tasks that are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest

from fluxdeploy.errors import UsageError
from fluxdeploy.host.asynchronous import AsyncFluxPipeline, Preview, StepEnd
from fluxdeploy.host.pipeline import FluxPipeline, FluxPipelineOutput
from tests.host.conftest import MemoryEngine
from tests.host.test_cancel import LIMIT, Gate

T = TypeVar("T")

CALL: dict[str, Any] = {"seed": 1, "max_sequence_length": 16, "output_type": "np"}


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, LIMIT))


def test_an_awaited_call_gives_what_the_pipeline_gives(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    expected = [pipe(prompt, **CALL).images for prompt in ("fox", "hen")]

    async def both() -> list[FluxPipelineOutput]:
        async with AsyncFluxPipeline(pipe) as asynchronous:
            return list(
                await asyncio.gather(*(asynchronous(prompt, **CALL) for prompt in ("fox", "hen")))
            )

    for output, images in zip(run(both()), expected, strict=True):
        np.testing.assert_array_equal(output.images, images)
    assert all(engine.closed for engine in engines.values())


def test_a_stream_has_each_step_the_previews_and_the_output(pipe: FluxPipeline) -> None:
    async def events() -> list[Any]:
        stream = AsyncFluxPipeline(pipe).stream("fox", num_previews=2, **CALL)
        return [event async for event in stream]

    first, *rest = run(events())
    kinds = [type(event) for event in (first, *rest)]
    # A preview is shown within the step that it belongs to.
    assert kinds == [Preview, StepEnd, Preview, StepEnd, StepEnd, FluxPipelineOutput]
    assert first.step == 1
    assert [event.step for event in rest if isinstance(event, StepEnd)] == [1, 2, 3]
    np.testing.assert_array_equal(rest[-1].images, pipe("fox", **CALL).images)


def test_a_cancelled_task_frees_the_engines_for_the_next_call(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    expected = pipe("hen", **CALL).images

    async def cancelled() -> FluxPipelineOutput:
        asynchronous = AsyncFluxPipeline(pipe)
        gate = Gate(engines["transformer"])
        first = asyncio.create_task(asynchronous("fox", num_inference_steps=1000, **CALL))
        await asyncio.to_thread(gate.reached.wait, LIMIT)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        # The one at the gate is among them: it was counted when it began.
        runs = len(engines["transformer"].runs)
        gate.open.set()
        output = await asynchronous("hen", **CALL)
        assert len(engines["transformer"].runs) == runs + 3
        return output

    np.testing.assert_array_equal(run(cancelled()).images, expected)


def test_leaving_a_stream_ends_its_call(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    gate = Gate(engines["transformer"], 1)

    async def leave() -> None:
        stream = AsyncFluxPipeline(pipe).stream("fox", num_inference_steps=100_000, **CALL)
        event = await anext(stream)
        assert isinstance(event, StepEnd)
        await asyncio.to_thread(gate.reached.wait, LIMIT)
        await stream.aclose()
        gate.open.set()
        while pipe.stats.running:
            await asyncio.sleep(0.001)

    run(leave())
    assert len(engines["transformer"].runs) == 2


def test_a_call_without_a_thread_fails_and_does_not_hang(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def begin() -> None:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            async for _ in AsyncFluxPipeline(pipe).stream("fox", **CALL):
                pass

    run(begin())


def test_errors_are_those_of_the_call(pipe: FluxPipeline) -> None:
    async def wrong() -> None:
        asynchronous = AsyncFluxPipeline(pipe)
        with pytest.raises(UsageError, match="seed"):
            await asynchronous("fox", seed=-1)
        with pytest.raises(UsageError, match="seed"):
            async for _ in asynchronous.stream("fox", seed=-1):
                pass
        with pytest.raises(UsageError, match="`cancel`"):
            await asynchronous("fox", cancel=None)
        with pytest.raises(UsageError, match="`callback_on_preview`"):
            async for _ in asynchronous.stream("fox", callback_on_preview=print):
                pass

    run(wrong())
