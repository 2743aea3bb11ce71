"""The GPU's own figures, where there is one."""

from __future__ import annotations

from engines.gpu import has_nvidia_driver
from fluxdeploy.bench.gpu import open_meter


def test_a_meter_needs_a_driver() -> None:
    meter = open_meter()
    if not has_nvidia_driver():
        assert meter is None
    if meter is not None:
        assert meter.name()
        assert meter.memory() is not None
    assert open_meter(10_000) is None
