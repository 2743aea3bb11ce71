"""The programs of engines/cpp that tests talk to, compiled once a session, as fixtures."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fluxdeploy.bundle.manifest import TokenizerRecord
from tests.support.shared_folder import SharedFolder

__all__ = ["Readers", "fuzz_program", "readers"]

CPP = Path(__file__).parents[3] / "engines/cpp"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


class Readers:
    """engines/cpp/tests/readers.cpp, as functions."""

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


def _sources() -> list[Path]:
    """All that reads files and text, which needs no runtime's headers."""
    folders = (CPP / "src", CPP / "src/files", CPP / "src/text")
    inside = [path for folder in folders[1:] for path in sorted(folder.glob("*.cpp"))]
    return [folders[0] / "errors.cpp", *inside]


def _compile(folder: Path, flags: Sequence[str]) -> None:
    """`folder/readers` and `folder/fuzz`."""
    folder.mkdir(exist_ok=True)
    common = ["g++", "-std=c++17", "-O1", *flags, "-I", str(CPP / "src")]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([*common, "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, _sources()))
    fuzz = ["-Wl,--wrap=open", *map(str, sorted((CPP / "fuzz").glob("*.cpp")))]
    for name, own in (("readers", [str(CPP / "tests/readers.cpp")]), ("fuzz", fuzz)):
        subprocess.run([*common, *own, *objects, "-lpng", "-o", folder / name], check=True)


@pytest.fixture(scope="session")
def programs(shared_folder: SharedFolder) -> Callable[..., Path]:
    """`programs(*flags)`: the folder of the programs, compiled with these."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")

    def make(*flags: str) -> Path:
        name = "-".join(["cpp-programs", *(["sanitized"] if flags else [])])
        return shared_folder.entry(name, lambda folder: _compile(folder, flags))

    return make


@pytest.fixture(scope="session")
def readers(programs: Callable[..., Path]) -> Readers:
    return Readers(programs() / "readers")


@pytest.fixture(scope="session")
def fuzz_program(programs: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """Where many inputs are asked for, compiled with sanitizers."""
    many = request.config.getoption("fuzz_examples")
    return programs(*(SANITIZERS if many else ())) / "fuzz"
