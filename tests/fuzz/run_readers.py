"""A process that gives readers damaged input: `run_readers.py SCRATCH SEED READER=EXAMPLES ...`.

Prints a JSON line for each reader. Ends with an error where a reader fails; the input is then on
stderr, made as small as hypothesis can, and where the process was ended for its time or memory in
SCRATCH/<reader>/input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed

from fluxdeploy.errors import FluxDeployError
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.watch import Watch

SECONDS = 5.0
MEMORY = 1500 << 20


def run(reader: Reader, watch: Watch, examples: int, seed: int) -> dict[str, float]:
    """Read so many damaged inputs; returns what a report says of them."""
    counts = {"inputs": 0, "refused": 0}
    kept = os.open(watch.scratch / "input", os.O_RDWR | os.O_CREAT)
    watch.slowest = 0.0

    @with_seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs)
    def read(value: object) -> None:
        shown = repr(value).encode("utf-8", "backslashreplace")
        os.ftruncate(kept, 0)
        os.pwrite(kept, shown, 0)
        counts["inputs"] += 1
        try:
            with watch.example():
                reader.read(value)
        except FluxDeployError as error:
            counts["refused"] += 1
            if len(str(error)) > 3000:
                raise ValueError(f"its message has {len(str(error))} characters") from error
        assert not watch.outside, watch.outside

    started = time.perf_counter()
    read()
    return {
        **counts,
        "seconds": round(time.perf_counter() - started, 1),
        "slowest": round(watch.slowest, 3),
        "megabytes": watch.peak >> 20,
    }


def main(scratch: Path, seed: int, examples: dict[str, int]) -> None:
    readers = {}
    for name in examples:
        (scratch / name).mkdir(parents=True)
        reader = readers[name] = READERS[name](scratch / name)
        with suppress(FluxDeployError):
            reader.read(reader.first)
    watch = Watch(scratch, SECONDS, MEMORY)
    watch.begin()
    for name, reader in readers.items():
        watch.scratch = scratch / name
        found = run(reader, watch, examples[name], seed)
        print(json.dumps({"reader": name, **found}), flush=True)


if __name__ == "__main__":
    pairs = (word.split("=") for word in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {name: int(count) for name, count in pairs})
