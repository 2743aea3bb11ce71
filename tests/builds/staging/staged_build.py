"""A small staged build that can be killed anywhere; run as a program by test_staging_killed.py.

`staged_build.py build DESTINATION CHECKPOINT VERSION` builds once, slowly. `staged_build.py sweep
FOLDER PREVIOUS SWAP` kills a build right before each of its changes to the disk, one after the
other, and checks what is left.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from fluxdeploy.build import staging
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.files import link_or_copy
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    Defaults,
    EngineRecord,
    FileRecord,
    LatentSpec,
    Manifest,
    QualityRecord,
    RopeSpec,
    ScheduleSpec,
    TokenizerRecord,
)
from fluxdeploy.errors import BundleError

COMPONENTS = ("one", "two", "three")
SHARED = "onnx/weights/shared.safetensors"
TOKENIZER = "tokenizers/clip.json"


def describe(components: dict[str, ComponentRecord], files: tuple[FileRecord, ...]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux",
        variant="tiny",
        guidance_embedding=False,
        components=components,
        latents=LatentSpec(16, 2, 8, 0.3611, 0.1159),
        rope=RopeSpec((16, 56, 56), 10000.0),
        schedule=ScheduleSpec(3.0, True, "exponential", 0.5, 1.15, 256, 4096, None),
        tokenizers={"clip": TokenizerRecord(TOKENIZER, 77, 1, (0,), (1,), "right", "right", files)},
        defaults=Defaults(512, 512, 4, 3.5, 256, 0.6),
        quality=QualityRecord(20.0, 0.75, None),
        provenance={},
    )


def build(destination: Path, checkpoint: Path, version: str, pause: float = 0.0) -> None:
    """Build `version`; the component `one` is the same in every version."""
    with staging.Staging(destination) as stage:
        components = {}
        for name in COMPONENTS:
            key = name if name == "one" else f"{name} {version}"
            files = stage.finished(name, key)
            path = f"onnx/{name}.onnx"
            if files is None:
                write(stage.root / path, key.encode() * 50, pause)
                link_or_copy(checkpoint, stage.root / SHARED)
                files = stage.record(name, key, [path, stage.root / SHARED])
            engines = (EngineRecord("onnxruntime", "1", "cpu", path, {}),)
            components[name] = ComponentRecord(key, "fp32", "fp32", (), (), files, engines, None)
        tokenizer = stage.finished("the tokenizer/1", version)
        if tokenizer is None:
            write(stage.root / TOKENIZER, version.encode(), pause)
            tokenizer = stage.record("the tokenizer/1", version, [TOKENIZER])
        write(stage.root / "scratch/log.txt", b"left behind by a tool", pause)
        stage.commit(describe(components, tokenizer))


def write(path: Path, data: bytes, pause: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb", buffering=0) as file:  # in place, as exporters do
        for start in range(0, len(data), 200):
            sys.audit("staged_build.write")
            file.write(data[start : start + 200])
            time.sleep(pause)


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below `root`: the bytes of files, None for folders."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


CHANGES = {
    "ctypes.dlsym",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "staged_build.write",
}


def build_killed_at(change: int, destination: Path, checkpoint: Path) -> bool:
    """Build version 2 in a process that dies before its `change`-th change; False if it ends."""
    process = os.fork()
    if process == 0:
        counter = itertools.count()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            creates = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
            )
            if (creates or event in CHANGES) and next(counter) == change:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            build(destination, checkpoint, "2")
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def sweep(folder: Path, previous: str, swap: str) -> int:
    """Returns how many places a build was killed at; fails where one leaves half a bundle."""
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    if swap == "rename":
        staging.exchange = lambda first, second: False
    checkpoint = folder / "checkpoint.safetensors"
    checkpoint.write_bytes(b"weights" * 100)
    allowed = []
    for version in ("1", "2"):
        build(folder / version, checkpoint, version)
        allowed.append(tree(folder / version))
    destination = folder / "out" / "bundle"
    for change in itertools.count():
        shutil.rmtree(destination.parent, ignore_errors=True)
        destination.parent.mkdir()
        if previous == "earlier":
            build(destination, checkpoint, "1")
        killed = build_killed_at(change, destination, checkpoint)
        check_left(destination, allowed, previous, swap)
        build(destination, checkpoint, "2")
        assert tree(destination) == allowed[1], f"another bundle after change {change}"
        assert os.listdir(destination.parent) == ["bundle"], os.listdir(destination.parent)
        assert checkpoint.read_bytes() == b"weights" * 100
        if not killed:
            return change
    raise AssertionError


def check_left(
    destination: Path, allowed: list[dict[str, bytes | None]], previous: str, swap: str
) -> None:
    aside = destination.with_name(".bundle.previous")
    if destination.exists():
        open_bundle(destination, check="all")
        assert tree(destination) in allowed
    elif previous == "earlier":
        assert swap == "rename"
        assert tree(aside) == allowed[0]
        message = ""
        try:
            open_bundle(destination)
        except BundleError as error:
            message = str(error)
        assert str(aside) in message


def main(command: str, *arguments: str) -> None:
    if command == "build":
        destination, checkpoint, version = arguments
        sys.stdout.write("started\n")
        sys.stdout.flush()
        build(Path(destination), Path(checkpoint), version, pause=0.001)
    else:
        folder, previous, swap = arguments
        sys.stdout.write(f"{sweep(Path(folder), previous, swap)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
