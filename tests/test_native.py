"""What native libraries raise becomes an error of ours, which says what ran out and what helps."""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxdeploy.bundle.files import disk_errors, read_whole
from fluxdeploy.bundle.manifest import FileRecord, TokenizerRecord
from fluxdeploy.errors import BundleError, EngineError, UsageError
from fluxdeploy.native import exhausted, native_errors, try_threads
from fluxdeploy.text.bundle import load_tokenizers

ROOT = Path(__file__).parents[1]

MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc",
    "bfc_arena.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 9",
    "BFCArena::AllocateRawInternal Available memory of 5 is smaller than requested bytes of 9",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000 bytes.",
    "Unable to allocate 7.45 GiB for an array with shape (1000000000,)",
    "Cannot load library libopenvino_onnx_frontend.so: failed to map segment from shared object",
    "bad allocation",
)
GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; file=cuda_allocator.cc",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Error Code 1: Cuda Runtime (out of memory)",
    "Requested amount of GPU memory (1024 bytes) could not be allocated.",
)
THREADS = (
    "can't start new thread",
    "PosixThread pthread_create failed, error code: 11 error msg: Resource temporarily unavailable",
    'ThreadPoolBuildError { kind: IOError(Os { code: 11, message: "Resource temporarily '
    'unavailable" }) }',
    "thread constructor failed: Resource temporarily unavailable",
    "libgomp: Thread creation failed: Resource temporarily unavailable",
)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        *((words, "^memory ran out; close other programs") for words in MEMORY),
        *((words, "^the GPU's memory ran out") for words in GPU),
        *((words, "^the system starts no more threads .* `ulimit -u`") for words in THREADS),
    ],
)
def test_what_ran_out_is_told_with_what_helps(words: str, told: str) -> None:
    failed = pytest.raises(EngineError, match=f"T5 failed: {told[1:]}")
    with failed, native_errors(EngineError, "T5 failed", "Build it again."):
        raise RuntimeError(words)
    assert str(exhausted(RuntimeError(words))).startswith(told[1:20])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), np._core._exceptions._ArrayMemoryError((9,), np.dtype("f4")),
     OSError(errno.ENOMEM, "Cannot allocate memory")],
)  # fmt: skip
def test_exceptions_that_mean_memory_by_their_kind(error: Exception) -> None:
    assert str(exhausted(error)).startswith("memory ran out")


@pytest.mark.parametrize(
    "error", [ValueError("Load model failed"), OSError(errno.ENOENT, "none"), RuntimeError("")]
)
def test_nothing_ran_out_otherwise(error: Exception) -> None:
    assert exhausted(error) is None


def test_other_errors_keep_their_words_within_bounds() -> None:
    for words, told in (
        ("one\n  two.", r"^It failed: one two\. Build it again\.$"),
        ("", r"^It failed: RuntimeError\. Build"),
        ("x" * 10**6, r"^It failed: x{600} \.\.\.\. Build"),
    ):
        failed = pytest.raises(EngineError, match=told)
        with failed, native_errors(EngineError, "It failed", "Build it again."):
            raise RuntimeError(words)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UsageError])
def test_what_is_no_failure_of_the_library_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), native_errors(EngineError, "It failed"):
        raise error


def _stub(folder: Path, document: Any) -> Any:
    (folder / "x.json").write_text(document if isinstance(document, str) else json.dumps(document))
    files = (FileRecord("x.json", 0, "0" * 64),)
    record = TokenizerRecord("x.json", 77, 0, (), (), "right", "right", files)

    def read(file: FileRecord) -> bytes:
        with disk_errors("read", folder / file.path):
            return read_whole(folder / file.path, 16 << 20)

    return SimpleNamespace(
        root=folder,
        read=read,
        path=folder.joinpath,
        manifest=SimpleNamespace(tokenizers={"clip": record, "t5": record}),
    )


def _with_map(characters: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(characters).decode()
    return {
        "version": "1.0",
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": encoded},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
    }


@pytest.mark.parametrize("characters", [b"\xff" * 64, b"\x01", b"\xff\xff\xff\x7f" + bytes(9)])
def test_a_panic_while_a_tokenizer_is_read(tmp_path: Path, characters: bytes) -> None:
    with pytest.raises(
        BundleError, match=r"tokenizer .*x\.json cannot be read: .*Build the bundle"
    ):
        load_tokenizers(_stub(tmp_path, _with_map(characters)))


def test_a_panic_on_a_prompt(tmp_path: Path) -> None:
    loaded = load_tokenizers(_stub(tmp_path, _with_map(bytes(64))))
    with pytest.raises(BundleError, match=r"clip tokenizer fails on a prompt: .*Build the bundle"):
        loaded.clip(["a fox"])
    with pytest.raises(BundleError, match="fails on a prompt"):
        loaded.clip_tokenizer.count("a fox")


@pytest.mark.parametrize("kind", ["pipe", "sparse", "text", "empty", "not UTF-8"])
def test_a_tokenizer_that_is_no_file_or_too_large(tmp_path: Path, kind: str) -> None:
    stub = _stub(tmp_path, "{" if kind == "text" else "")
    path = tmp_path / "x.json"
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "sparse":
        os.truncate(path, 1 << 40)
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff{}")
    with pytest.raises(BundleError, match=r"Cannot read .*x\.json: |x\.json cannot be read"):
        load_tokenizers(stub)


def limited(limit: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code after `limit`, as a user that limits hold for; the root user may have any number."""
    prepared = f"import os, resource, threading\n{code}"
    return subprocess.run(
        [sys.executable, "-c", prepared.replace("LIMIT", limit)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


OPEN = """
import numpy as np, onnxruntime
from engines.base import EngineOptions
from engines.onnxruntime import _session
LIMIT
try:
    _session("nowhere.onnx", "cpu", EngineOptions(), "t5", "fp32")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become a user without other threads")
def test_a_session_that_cannot_have_its_threads_does_not_wait_for_them() -> None:
    # Another user's id, which nobody has: the limit is then of this process alone.
    limit = "os.setuid(64321); resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))"
    done = limited(limit, OPEN)
    assert "EngineError ONNX Runtime cannot open t5" in done.stdout, done.stderr
    assert "the system starts no more threads" in done.stdout


def test_threads_that_start_end_again() -> None:
    import threading

    before = threading.active_count()
    try_threads(20)
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [BundleError, EngineError, UsageError])
def test_a_message_that_quotes_a_file_stays_readable(kind: type[Exception]) -> None:
    message = str(kind(f"The scheduler is {'x' * 10**6}; it must be another."))
    assert len(message) < 2100
    assert message.startswith("The scheduler is xxx")
    assert message.endswith("xxx; it must be another.")
    assert str(kind("short")) == "short"
