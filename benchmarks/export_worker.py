"""Exports every component of a checkpoint; `export_scale.py` measures this process.

    python export_worker.py CHECKPOINT OUTPUT PRECISION

Prints a JSON object a line: the seconds of the imports, of each component, and the peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

_started = time.perf_counter()

from exporters.checkpoint import open_checkpoint  # noqa: E402
from exporters.checkpoint.controlnet import with_controlnets  # noqa: E402
from exporters.components.registry import components_of  # noqa: E402
from exporters.export import export_component, specify  # noqa: E402
from exporters.weights.bind import WeightFolder  # noqa: E402


def _tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    try:
        # Not getrusage: its figure survives exec, so it counts the parent that forked.
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main(source: str, output: str, precision: str) -> None:
    """Export `source` to the folder `output`."""
    _tell(imports=time.perf_counter() - _started)
    weights = WeightFolder(Path(output) / "weights")
    controlnet = Path(source) / "controlnet"
    checkpoint = open_checkpoint(source)
    if controlnet.is_dir():
        checkpoint = with_controlnets(checkpoint, [controlnet])
    for name, component in components_of(checkpoint).items():
        if not component.present(checkpoint):
            continue
        started = time.perf_counter()
        exported = export_component(specify(checkpoint, component, precision), weights)
        _tell(component=name, seconds=time.perf_counter() - started, path=exported.path)
    _tell(peak=peak_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
