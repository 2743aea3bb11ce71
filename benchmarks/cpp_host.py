"""The C++ host beside the Python host, in one run: start to picture, a step, and memory.

    python benchmarks/cpp_host.py BUNDLE PROGRAM [--rounds N] [--out results/cpp_host.json]

PROGRAM is the command that `make cpp` builds. Each round starts both as a user does, one after the
other: what is slow on the machine at that time is slow for both. A step is told from the same start
with more steps: (time of 100 steps - time of 2) / 98. Figures are medians. On a machine that does
other work too, `chrt --fifo 10 python ...` gives both hosts the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fluxdeploy.machine import describe_cpu

PROMPT = "a red circle above a blue square"
FEW, MANY = 2, 100


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of a program from start to end, and MiB of its memory at most."""
    report = folder / "usage"
    child = os.fork()
    if child == 0:
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.stderr.write(done.stderr)
            os._exit(1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        report.write_text(f"{seconds} {peak}")
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{command[0]} failed")
    seconds, peak = map(float, report.read_text().split())
    return seconds, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bundle = str(arguments.bundle)
    hosts = {
        "python": [sys.executable, "-m", "fluxdeploy", "generate", PROMPT, "--bundle", bundle],
        "cpp": [str(arguments.program), bundle, PROMPT],
    }
    seconds: dict[tuple[str, int], list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(arguments.rounds):
            for steps in (FEW, MANY):
                for host, command in hosts.items():
                    options = ["--seed", "7", "--steps", str(steps), "--out", f"{name}/x.png"]
                    time_, peak = measure([*command, *options], folder)
                    seconds.setdefault((host, steps), []).append(time_)
                    memory.setdefault(host, []).append(peak)
    report: dict[str, Any] = {
        "processor": describe_cpu()["name"] or platform.processor(),
        "cores": os.cpu_count(),
        "rounds": arguments.rounds,
        "library_bytes": (arguments.program.parent / "libfluxdeploy.so").stat().st_size,
    }
    for host in hosts:
        few, many = (statistics.median(seconds[host, steps]) for steps in (FEW, MANY))
        report[host] = {
            "start_to_picture_s": round(few, 3),
            "step_ms": round(1000 * (many - few) / (MANY - FEW), 2),
            "peak_mib": round(statistics.median(memory[host]), 1),
        }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
