"""The metrics of `flux`, which Triton shows beside its own on its port for Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fluxdeploy.host.stats import PipelineStats
from fluxdeploy.serve.triton.fields import STAGES

__all__ = ["OUTCOMES", "Metrics"]

OUTCOMES = ("made", "cancelled", "refused", "invalid", "failed")
"""How a request ends. Refused are those that find the queue full."""

_COUNTERS = {
    "fluxdeploy_pictures": ("Pictures made", None, ()),
    "fluxdeploy_steps": ("Steps made, of cancelled requests too", None, ()),
    "fluxdeploy_requests": ("Requests that have ended", "outcome", OUTCOMES),
    "fluxdeploy_stage_seconds": ("Seconds of finished requests by stage", "stage", STAGES),
    "fluxdeploy_prompt_cache": ("Encoded prompts asked for", "outcome", ("hit", "miss")),
}
"""By name: the help, the label, and the label's values."""

_GAUGES = {
    "fluxdeploy_waiting": "Requests that wait to begin",
    "fluxdeploy_running": "Requests that have begun and not ended",
}


class Metrics:
    """Counts in any thread, and tells Triton in one.

    pb: Triton's `triton_python_backend_utils`.
    """

    def __init__(self, pb: Any, stats: PipelineStats) -> None:
        """stats: from which on to count."""
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seen = stats
        self._metrics: dict[tuple[str, str], Any] = {}
        self._families = []  # they end with the last reference
        for name, (text, label, values) in _COUNTERS.items():
            family = pb.MetricFamily(
                name=f"{name}_total", description=text, kind=pb.MetricFamily.COUNTER
            )
            self._families.append(family)
            for value in values or ("",):
                labels = {} if label is None else {label: value}
                self._metrics[name, value] = family.Metric(labels=labels)
        for name, text in _GAUGES.items():
            family = pb.MetricFamily(name=name, description=text, kind=pb.MetricFamily.GAUGE)
            self._families.append(family)
            self._metrics[name, ""] = family.Metric(labels={})

    def ended(self, outcome: str, seconds: Mapping[str, float]) -> None:
        """Count a request that has ended so, after so many seconds by stage."""
        with self._lock:
            self._counts["fluxdeploy_requests", outcome] += 1
            for stage in STAGES:
                # A Counter of Python takes any numbers.
                self._counts["fluxdeploy_stage_seconds", stage] += seconds.get(stage, 0.0)  # type: ignore[assignment]

    def tell(self, stats: PipelineStats) -> None:
        """Tell Triton what has changed; in one thread alone."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        seen, self._seen = self._seen, stats
        counts["fluxdeploy_pictures", ""] = stats.pictures - seen.pictures
        counts["fluxdeploy_steps", ""] = stats.steps - seen.steps
        counts["fluxdeploy_prompt_cache", "hit"] = stats.prompt_hits - seen.prompt_hits
        counts["fluxdeploy_prompt_cache", "miss"] = stats.prompt_misses - seen.prompt_misses
        for key, more in counts.items():
            if more:
                self._metrics[key].increment(more)
        for name, before, now in (
            ("fluxdeploy_waiting", seen.waiting, stats.waiting),
            ("fluxdeploy_running", seen.running, stats.running),
        ):
            if before != now:
                self._metrics[name, ""].set(now)
