"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CountedRequests", "Metrics"]

# When a series began is no series of its own.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fluxdeploy_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._pictures = self._counter("pictures", "Pictures that were drawn.")
        self._pixels = self._counter("pixels", "Pixels of the pictures that were drawn.")
        self._steps = self._counter(
            "steps", "Steps of calls that were made, of cancelled ones too."
        )
        self._cancelled = self._counter("cancelled", "Calls whose client left before the end.")
        self._stages = Histogram(
            "fluxdeploy_stage_seconds",
            "Seconds of a call by stage; queued is waiting.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._latency = Histogram(
            "fluxdeploy_call_seconds",
            "Seconds from a request's arrival to its pictures, by priority.",
            ["priority"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"fluxdeploy_{name}", text, registry=self._registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell a number that somebody else keeps."""
        Gauge(f"fluxdeploy_{name}", text, registry=self._registry).set_function(value)

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def step(self) -> None:
        """A step of a call was made."""
        self._steps.inc()

    def cancelled(self, waited: float | None) -> None:
        """A client left, after so many seconds where no step was made yet."""
        self._cancelled.inc()
        if waited is not None:
            self._stages.labels("queued").observe(waited)

    def drawn(
        self, pictures: int, pixels: int, stages: Mapping[str, float], seconds: float, priority: str
    ) -> None:
        """A call has ended with its pictures."""
        self._pictures.inc(pictures)
        self._pixels.inc(pixels)
        for stage, passed in stages.items():
            self._stages.labels(stage).observe(passed)
        self._latency.labels(priority).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class CountedRequests:
    """A layer of the application that counts its requests, by the route that each found."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an application of ASGI."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.request(route, message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
