"""Damaged requests on raw connections: no 5xx, no hang, no file read, the server goes on.

With `pytest tests/serve/test_fuzz_requests.py --fuzz-examples 10000` as many as you say.
"""

from __future__ import annotations

import io
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.conftest import Serving, connect
from tests.serve.test_images_api import get

_DEFAULT = 200
_SECONDS = 20
"""After which an answer counts as a hang."""

_WORDS = (
    *(b"\0", b"\r\n", b"\xff\xfe", b"%00", b"../", b"..%2f", b"{", b"}", b"[", b"NaN", b"1e999"),
    *(b"--x", b"9" * 400, b"a" * 70_000, b'"', b"\\ud800", b"-1", b"null", b"Content-Length: 5"),
)


def seeds() -> list[bytes]:
    """Requests that are answered well."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "PNG")
    body = json.dumps({"prompt": "a ring", "num_inference_steps": 1, "size": "32x32"}).encode()
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = b"".join(
        (
            part % (b"prompt", b"", b"a ring"),
            part % (b"size", b"", b"32x32"),
            part % (b"num_inference_steps", b"", b"2"),
            part % (b"image", b'; filename="a.png"', file.getvalue()),
            b"--x--\r\n",
        )
    )
    return [
        request(b"POST /v1/images/generations", body, b"application/json"),
        request(b"POST /v1/images/generations", body[:-1] + b', "stream": true}', b"text/plain"),
        request(b"POST /v1/images/edits", form, b"multipart/form-data; boundary=x"),
        request(b"GET /v1/models/demo", b"", b"text/plain"),
        request(b"GET /v1/images/files/abc", b"", b"text/plain"),
        request(b"GET /", b"", b"text/plain"),
    ]


def request(line: bytes, body: bytes, kind: bytes) -> bytes:
    head = b"%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: %s\r\n" % (line, kind)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def damaged(data: bytes, source: random.Random) -> bytes:
    """A few cuts, swaps, repetitions, flipped bytes and words from elsewhere."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at, other = sorted(source.randrange(len(changed) + 1) for _ in range(2))
        kind = source.randrange(5)
        if kind == 0:
            changed[at:at] = source.choice(_WORDS)
        elif kind == 1 and changed:
            changed[min(at, len(changed) - 1)] = source.randrange(256)
        elif kind == 2:
            del changed[at : min(other, at + 40)]
        elif kind == 3:
            changed[at:at] = changed[at : min(other, at + 300)]
        else:
            changed[at:other] = source.choice(_WORDS)
    return bytes(changed)


def with_true_length(data: bytes) -> bytes:
    """The request with the length of its body, so that the body itself is read."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body


def status(url: str, data: bytes, whole: bool) -> int | None:
    """What the server answers; None where it ends the connection without a word.

    whole: all that was announced is there, so that an answer is waited for.
    """
    with connect(url) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.sendall(data)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while b"\r\n" not in answer and (more := connection.recv(1 << 16)):
                answer += more
        except (BrokenPipeError, ConnectionResetError):
            return None
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that are opened meanwhile in this process, which is the server's too."""
    found: list[str] = []
    listening = True

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str):
            found.append(arguments[0])

    sys.addaudithook(hear)
    yield found
    listening = False


def test_damaged_requests_break_nothing(
    serving: Serving, opened: list[str], request: pytest.FixtureRequest
) -> None:
    count = request.config.getoption("--fuzz-examples") or _DEFAULT
    source, answers = random.Random(14), Counter[int | None]()
    page = Path("fluxdeploy/serve/images_api/page").resolve()
    with serving(max_pixels=4096, max_steps=2, max_body=1 << 20) as url:
        for seed in seeds():
            answers[status(url, seed, True)] += 1
        assert set(answers) <= {200, 404}
        opened.clear()
        for number in range(count):
            data = damaged(source.choice(seeds()), source)
            whole = number % 2 == 0
            answers[status(url, with_true_length(data) if whole else data, whole)] += 1
        elsewhere = [name for name in opened if Path(name).is_absolute()]
        elsewhere = [name for name in elsewhere if not Path(name).is_relative_to(page)]
        # Where the system tells of memory is read for each picture.
        known = ("site-packages", "/lib/", "/proc/meminfo", "/proc/self/", "/sys/fs/cgroup/")
        assert not [name for name in elsewhere if not any(part in name for part in known)]
        assert get(url, "/health") == b'{"status":"ok"}'
        assert b"fluxdeploy_running 0.0" in get(url, "/metrics")
    assert not [code for code in answers if code is not None and code >= 500], answers
    assert answers[400] > count / 10
    print(dict(answers))
