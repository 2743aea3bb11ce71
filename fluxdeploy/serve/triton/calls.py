"""The requests that a model has taken: each is a call in a thread of its own."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.base import Array
from fluxdeploy.errors import Cancelled, FluxDeployError, QueueFullError, UsageError
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.serve.triton.fields import OUTPUTS
from fluxdeploy.serve.triton.metrics import Metrics
from fluxdeploy.serve.triton.requests import (
    Asked,
    final_tensors,
    picture_tensors,
    read_request,
)

__all__ = ["Calls"]

_INTERVAL = 0.01
"""Seconds between two looks at whether clients have cancelled."""


class Calls:
    """The requests of a model that are not answered yet.

    pb: Triton's `triton_python_backend_utils`. default_timeout: seconds of a request that has no
    timeout of its own; 0 for none.
    """

    def __init__(
        self, pb: Any, pipeline: FluxPipeline, metrics: Metrics, default_timeout: float
    ) -> None:
        self._pb = pb
        self._pipeline = pipeline
        self._metrics = metrics
        self._default_timeout = default_timeout
        self._live: dict[_Call, threading.Thread] = {}
        self._changed = threading.Condition()
        self._news = True
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="fluxdeploy-watch", daemon=True)
        self._watcher.start()

    def start(self, request: Any) -> None:
        """Begin a request, and return at once."""
        timeout = request.timeout() / 1e6 or self._default_timeout
        call = _Call(self._pb, request, timeout)
        thread = threading.Thread(target=self._run, args=(call,), name="fluxdeploy-call")
        thread.daemon = True
        with self._changed:
            self._live[call] = thread
            self._news = True
            self._changed.notify_all()
        thread.start()

    def close(self) -> None:
        """End all of them, and wait for that."""
        with self._changed:
            threads = dict(self._live)
        for call in threads:
            call.token.cancel()
        for thread in threads.values():
            thread.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._watcher.join()

    def _run(self, call: _Call) -> None:
        outcome = "failed"
        seconds: Mapping[str, float] = {}
        answer: Mapping[str, Array] = {}
        error: tuple[str, str] | None = None
        try:
            answer, seconds = call.run(self._pipeline)
            outcome = "made"
        except QueueFullError as full:
            outcome = "refused"
            error = "UNAVAILABLE", f"{full} About {full.retry_after:.1f} s of work are ahead."
        except UsageError as wrong:
            outcome, error = "invalid", ("INVALID_ARG", str(wrong))
        except Cancelled as cancelled:
            outcome, error = "cancelled", ("CANCELLED", call.why_cancelled(cancelled))
        except FluxDeployError as failure:
            error = "INTERNAL", str(failure)
        except BaseException as bug:  # noqa: BLE001 - whatever it is, the client waits for an answer
            self._pb.Logger.log_error(traceback.format_exc())
            error = "INTERNAL", f"This is a bug in fluxdeploy ({type(bug).__name__}: {bug})."
        self._metrics.ended(outcome, seconds)
        call.end(answer, error)
        with self._changed:
            del self._live[call]
            self._news = True
            self._changed.notify_all()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._live or self._closed)
                live, self._news = list(self._live), False
                if self._closed and not live:
                    return
            try:
                for call in live:
                    call.look()
                self._metrics.tell(self._pipeline.stats)
            except Exception:  # noqa: BLE001 - without it no request could be cancelled any more
                self._pb.Logger.log_error(traceback.format_exc())
            time.sleep(_INTERVAL)


class _Call:
    """A request, from its arrival to its last response."""

    def __init__(self, pb: Any, request: Any, timeout: float) -> None:
        self.token = CancelToken()
        self._pb = pb
        self._request = request
        self._sender = request.get_response_sender()
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout if timeout else None
        self._late = False
        self._steps = 0
        self._wanted: set[str] = set()
        # An ended request must not be asked whether it is cancelled: Triton has freed it.
        self._lock = threading.Lock()
        self._ended = False

    def look(self) -> None:
        """Cancel the call where the client has, or where its time is over."""
        with self._lock:
            if self._ended or self.token.cancelled:
                return
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._late = True
            gone = self._late or self._request.is_cancelled()
        if gone:
            self.token.cancel()

    def why_cancelled(self, error: Cancelled) -> str:
        """What to tell the client."""
        over = f"The request's timeout of {self._timeout:g} s is over. "
        return f"{over if self._late else ''}{error}"

    def run(self, pipeline: FluxPipeline) -> tuple[dict[str, Array], Mapping[str, float]]:
        """The outputs of the last response, and the seconds by stage. Raises what the call does."""
        tensors = {each.name(): each.as_numpy() for each in self._request.inputs()}
        asked = read_request(tensors)
        wanted = set(self._request.requested_output_names()) - asked.left_out
        self._wanted = wanted or {field.name for field in OUTPUTS} - asked.left_out
        output = pipeline(**asked.arguments, cancel=self.token, **self._callbacks(asked))
        answer = final_tensors(output, self._steps, self._wanted)
        return self._event("final", answer), output.seconds

    def _callbacks(self, asked: Asked) -> dict[str, Any]:
        def on_step_end(pipe: object, step: int, timestep: float, state: object) -> None:
            self._steps = step + 1
            if asked.step_events:
                made = np.array([step + 1], np.int32)
                self._send(
                    self._event("step", {"step": made, "sigma": np.array([timestep / 1000])})
                )

        def on_preview(pipe: object, steps: int, images: Any) -> None:
            made = {"step": np.array([steps], np.int32)}
            self._send(self._event("preview", picture_tensors(images, self._wanted) | made))

        return {"callback_on_step_end": on_step_end, "callback_on_preview": on_preview}

    def _event(self, name: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
        found = {"event": np.array([name.encode()], np.object_), **tensors}
        return {name: values for name, values in found.items() if name in self._wanted}

    def _send(self, tensors: Mapping[str, Array]) -> None:
        """Send a response before the last one, unless nobody waits for it."""
        self.look()
        if not self.token.cancelled:
            self._sender.send(self._response(tensors))

    def _response(self, tensors: Mapping[str, Array]) -> Any:
        pb = self._pb
        return pb.InferenceResponse(
            [pb.Tensor(name, np.ascontiguousarray(values)) for name, values in tensors.items()]
        )

    def end(self, answer: Mapping[str, Array], error: tuple[str, str] | None) -> None:
        """Send the last response."""
        pb = self._pb
        with self._lock:
            self._ended = True
        response: Any
        if error is None:
            response = self._response(answer)
        else:
            code, message = error
            response = pb.InferenceResponse(
                error=pb.TritonError(message, getattr(pb.TritonError, code))
            )
        try:
            self._sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as failure:  # noqa: BLE001 - memory that is shared with the server may be short
            pb.Logger.log_error(f"A response could not be sent: {failure}")
            why = pb.TritonError(f"The response could not be sent: {failure}")
            self._sender.send(
                pb.InferenceResponse(error=why), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
