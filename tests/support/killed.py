"""Commands that are killed while they make pictures, and what must be there in the end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["kill_at", "lines_of", "made_wrongly"]


def lines_of(index: Path) -> int:
    """Whole lines of an index."""
    return index.read_bytes().count(b"\n") if index.exists() else 0


def kill_at(command: Sequence[str], index: Path, lines: int, delay: float = 0.0) -> bool:
    """Kill a command so many seconds after its index has so many lines; whether it still ran.

    Raises `RuntimeError` where it failed by itself.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while child.poll() is None and lines_of(index) < lines:
                time.sleep(0.002)
            time.sleep(delay)
        finally:
            child.kill()
            code = child.wait()
        if code > 0:
            said.seek(0)
            raise RuntimeError(said.read().decode("utf-8", "replace"))
    return code < 0


def made_wrongly(folder: Path, index: Path, count: int) -> list[str]:
    """What is wrong with a folder that shall have `count` pictures and their index, in words."""
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    found = []
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    there.discard(index.name)
    if len(there) != count:
        found.append(f"{len(there)} files, not {count} pictures")
    if there != {entry["path"] for entry in entries}:
        found.append("the files are not those of the index")
    twice = Counter(entry["path"] for entry in entries)
    found += [f"{path} is entered {times} times" for path, times in twice.items() if times > 1]
    for entry in entries:
        data = (folder / entry["path"]).read_bytes() if entry["path"] in there else b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            found.append(f"{entry['path']} is not what was written")
    return found
