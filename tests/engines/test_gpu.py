"""The NVIDIA GPUs of this machine, on a pretended one."""

from __future__ import annotations

import pytest

from engines import cuda, gpu


class Cuda:
    """Two GPUs."""

    def device_count(self) -> int:
        return 2

    def capability(self, device: int) -> tuple[int, int]:
        return [(8, 9), (12, 0)][device]


@pytest.mark.parametrize(
    ("driver", "package", "found"),
    [
        (True, True, ["sm89", "sm120", None]),
        (False, True, [None] * 3),
        (True, False, [None] * 3),
    ],
)
def test_a_gpu_is_a_target(
    monkeypatch: pytest.MonkeyPatch, driver: bool, package: bool, found: list[str | None]
) -> None:
    monkeypatch.setattr(cuda, "Cuda", Cuda)
    monkeypatch.setattr(gpu, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(gpu, "has_cuda_python", lambda: package)
    assert [gpu.compute_capability(device) for device in range(3)] == found
