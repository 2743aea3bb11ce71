"""Bundles made to harm: each is refused in one sentence, soon, and nothing outside is read."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.bundle import open_bundle
from fluxdeploy.errors import BundleError

SECONDS = 2.0
MEMORY = 500 << 20

Hostile = Callable[[Path], object]


def _text(data: bytes) -> Hostile:
    return lambda root: (root / "fluxdeploy.json").write_bytes(data)


def _edit(*places: str | int, value: Any) -> Hostile:
    """The manifest with another value in one place."""

    def edit(root: Path) -> None:
        path = root / "fluxdeploy.json"
        plain = node = json.loads(path.read_text("utf-8"))
        for place in places[:-1]:
            node = node[place]
        node[places[-1]] = value(node[places[-1]]) if callable(value) else value
        path.write_text(json.dumps(plain), "utf-8")

    return edit


def _shape(value: list[Any]) -> Hostile:
    return _edit(*T5, "inputs", 0, "shape", value=value)


def _clip(field: str, value: Any) -> Hostile:
    return _edit("tokenizers", "clip", field, value=value)


def _instead(name: str, make: Callable[[Path], object]) -> Hostile:
    """Something else in the place of a file."""

    def replace(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return replace


def _sparse(size: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def _socket(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


def _padded(root: Path) -> None:
    path = root / "fluxdeploy.json"
    path.write_bytes(path.read_bytes() + b" " * (5 << 20))


MANIFEST, T5, ONNX = "fluxdeploy.json", ("components", "t5"), "onnx/t5.onnx"
FILE = (*T5, "files", 0)

HOSTILE: dict[str, tuple[Hostile, str]] = {
    # The manifest's file.
    "a pipe": (_instead(MANIFEST, os.mkfifo), "named pipe"),
    "a link to a device": (_instead(MANIFEST, lambda p: p.symlink_to("/dev/zero")), "a device"),
    "a link to a terminal": (_instead(MANIFEST, lambda p: p.symlink_to("/dev/tty")), "a device"),
    "a socket": (_instead(MANIFEST, _socket), "a socket"),
    "a folder": (_instead(MANIFEST, Path.mkdir), "a folder"),
    "a link to itself": (_instead(MANIFEST, lambda p: p.symlink_to(p.name)), "lead in a circle"),
    "a link to nowhere": (_instead(MANIFEST, lambda p: p.symlink_to("no")), "There is no bundle"),
    "a terabyte of nothing": (_instead(MANIFEST, _sparse(1 << 40)), "1099511627776 bytes, and"),
    "a file of the system": (_instead(MANIFEST, lambda p: p.symlink_to("/proc/self/environ")), ""),
    "padding": (_padded, "bytes, and at most 4194304"),
    "nothing": (_text(b""), "not valid JSON"),
    "zeros": (_text(bytes(10_000)), "not valid JSON"),
    "bytes of no text": (_text(b"\xff\xfe" * 999), "not UTF-8"),
    "a list": (_text(b"[]"), "an object"),
    "depth": (_text(b"[" * 4_000_000), "nested too deeply"),
    "depth of objects": (_text(b'{"a":' * 800_000), "nested too deeply"),
    "a million values": (_text(b"[" + b"0," * 1_000_000 + b"0]"), "more than the 100000 values"),
    "a million strings": (_text(b"[" + b'"",' * 1_000_000 + b'""]'), "100000 values"),
    "a million keys": (_text(b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b"}"),
                       "100000 values"),
    "one key twice": (_text(b'{"schema_version":4,"schema_version":4}'), "occurs twice"),
    "a long key twice": (_text(b'{"%s":0,"%s":0}' % (b"k" * 10**6, b"k" * 10**6)), "occurs twice"),
    "a million digits": (_text(b'{"schema_version":' + b"9" * 10**6 + b"}"), "1000000 digits"),
    "infinity": (_text(b'{"schema_version":1e999}'), "too large"),
    "no number": (_text(b'{"schema_version":NaN}'), "NaN"),
    "half a character": (_text(b'{"\\ud800":1}'), "not valid JSON"),
    "a field of a million letters": (_text(b'{"schema_version":4,"%s":0}' % (b"x" * 10**6)),
                                     "not a known field"),
    # What it names.
    "a path of the system": (_edit(*FILE, "path", value="/etc/passwd"), "absolute"),
    "a path upwards": (_edit(*FILE, "path", value="../" * 9 + "etc/passwd"), "leaves the bundle"),
    "a path of Windows": (_edit(*FILE, "path", value="C:\\windows"), "backslash"),
    "a path with an escape": (_edit(*FILE, "path", value="\x1b]0;x\x07"), "control character"),
    "an empty path": (_edit(*FILE, "path", value=""), "is empty"),
    "a path without end": (_edit(*FILE, "path", value="x/" * 10**5 + "x"), ""),
    "the manifest itself": (_edit(*FILE, "path", value=MANIFEST), "the manifest itself"),
    "a negative size": (_edit(*FILE, "size", value=-1), "negative"),
    "a size past 64 bits": (_edit(*FILE, "size", value=2**64), "the manifest says"),
    "another hash": (_edit(*FILE, "sha256", value="0" * 64), "was changed"),
    "no hash": (_edit(*FILE, "sha256", value="x"), "hexadecimal"),
    "a file that is a pipe": (_instead(ONNX, os.mkfifo), "is missing"),
    "a file that is a device": (_instead(ONNX, lambda p: p.symlink_to("/dev/zero")), "leaves"),
    "a link to the system": (_instead(ONNX, lambda p: p.symlink_to("/etc/passwd")), "leaves"),
    "a link to the parent": (_instead(ONNX, lambda p: p.symlink_to("../../..")), "leaves"),
    "a file that is a folder": (_instead(ONNX, Path.mkdir), "is missing"),
    "a sparse file": (_instead(ONNX, _sparse(1 << 40)), "has 1099511627776 bytes"),
    "other bytes": (_instead(ONNX, lambda p: p.write_bytes(b"a grapH")), "was changed"),
    # Counts and sizes.
    "65 components": (_edit("components", value=lambda c: {str(i): c["t5"] for i in range(65)}),
                      "components has 65"),
    "5000 files": (_edit(*T5, "files", value=lambda f: f * 1700), ""),
    "65 engines": (_edit(*T5, "engines", value=lambda e: e * 65), "engines has 65"),
    "65 tensors": (_edit(*T5, "inputs", value=lambda t: t * 65), ""),
    "a tensor of 90,000 axes": (_shape([1] * 90_000), "shape"),
    "a tensor of 2 to the 80 elements": (_shape([2**20] * 4), "shape"),
    "a symbol of its own": (_shape(["Z"]), "shape"),
    "a symbol of a million letters": (_shape(["Z" * 10**6]), "shape"),
    "no dimensions": (_edit(*T5, "engines", 0, "dimensions", value={}), "dimensions"),
    "an engine elsewhere": (_edit(*T5, "engines", 0, "path", value="/lib/libc.so.6"), "path"),
    "golden tensors elsewhere": (_edit(*T5, "golden", "path", value="/etc/passwd"), "golden"),
    "a tokenizer elsewhere": (_clip("path", value="/etc/passwd"), "path"),
    "a prefix of 90,000 ids": (_clip("prefix", value=[1] * 90_000), "prefix"),
    "an id past 32 bits": (_clip("pad_id", value=2**31), "pad_id"),
    "10 to the 12 tokens": (_clip("max_length", value=10**12), "max_length"),
    "a height of 10 to the 12": (_edit("defaults", "height", value=16 * 10**11), ""),
    "10 to the 12 steps": (_edit("defaults", "num_inference_steps", value=10**12), "steps"),
    "text of 10 to the 12 tokens": (_edit("defaults", "max_sequence_length", value=10**12),
                                    "max_sequence_length"),
    "a billion channels": (_edit("latents", "channels", value=10**9), "channels"),
    "a patch of a billion": (_edit("latents", "patch_size", value=10**9), ""),
    "90,000 axes of RoPE": (_edit("rope", "axes_dims", value=[2] * 90_000), "axes_dims"),
    "an axis of a billion": (_edit("rope", "axes_dims", value=[10**9, 2]), "axes_dims"),
    "a shift of nothing": (_edit("schedule", "shift", value=0), "shift"),
    "a schedule backwards": (_edit("schedule", "max_image_seq_len", value=1), "base_image_seq_len"),
    "a version to come": (_edit("schema_version", value=10**9), "upgrade fluxdeploy"),
}  # fmt: skip


@pytest.fixture
def watched() -> Iterator[None]:
    """Bounds a test's time, and the memory that it may take beyond what is taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    started = time.process_time()

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_bundle_is_refused(bundle: Path, watched: None, kind: str) -> None:
    make, words = HOSTILE[kind]
    make(bundle)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert words in message
    assert len(message) < 1000
    assert "\n" not in message


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "/proc/self/mem", "pipe", "x" * 5000])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, watched: None, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError):
        open_bundle(tmp_path / place)
