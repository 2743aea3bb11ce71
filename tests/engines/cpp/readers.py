"""What the C++ library reads, asked through the program engines/cpp/tests/readers.cpp."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from fluxdeploy.bundle.manifest import TokenizerRecord

__all__ = ["Readers"]


class Readers:
    """The program's commands, as functions."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def run(self, *given: object, data: bytes = b"") -> bytes:
        """What the program prints. Raises `RuntimeError` with its error's words."""
        done = subprocess.run(
            [self._program, *map(str, given)], input=data, capture_output=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        return done.stdout

    def read(self, kind: str, paths: Iterable[Path]) -> list[str]:
        """For each file "ok" and what was read, or "error" and the message."""
        return self.run("read", kind, *paths).decode().splitlines()

    def tokenize(
        self,
        path: Path,
        name: str,
        record: TokenizerRecord,
        length: int | str,
        prompts: Sequence[bytes],
    ) -> list[str]:
        """For each prompt its ids, or "error" and the message. A `length` of "all" cuts nothing."""
        around = [",".join(map(str, ids)) for ids in (record.prefix, record.suffix)]
        given = (record.max_length, record.pad_id, *around, record.padding_side)
        data = b"".join(struct.pack("<I", len(prompt)) + prompt for prompt in prompts)
        out = self.run("tokenize", path, name, *given, record.truncation_side, length, data=data)
        return out.decode().split("\n")[:-1]
