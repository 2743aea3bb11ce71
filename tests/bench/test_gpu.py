"""The GPU's own figures, where there is one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from engines.gpu import has_nvidia_driver
from fluxdeploy.bench.gpu import GpuMeter, open_meter

pynvml = pytest.importorskip("pynvml")


def test_a_meter_needs_a_driver() -> None:
    meter = open_meter()
    if not has_nvidia_driver():
        assert meter is None
    if meter is not None:
        assert meter.name()
        assert meter.memory() is not None
    assert open_meter(10_000) is None


def test_figures_are_bytes_and_joules_and_none_where_they_are_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(handle: object) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    meter = GpuMeter(pynvml, "handle")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"GPU of {handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(used=7))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: 2500)
    assert (meter.name(), meter.memory(), meter.energy()) == ("GPU of handle", 7, 2.5)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", refuse)
    assert (meter.name(), meter.energy()) == ("", None)


def test_without_the_package_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter() is None
