"""`fluxdeploy serve` as a process: it warms up, drains on SIGTERM, and refuses what cannot be."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.conftest import LIMIT

COMMAND = [sys.executable, "-m", "fluxdeploy", "serve"]


def test_sigterm_lets_a_running_request_end(demo_bundle: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--bundle", str(demo_bundle), "--port", "0", "--model-name", "mine"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Warming up ")
        found = re.search(r"http://127.0.0.1:\d+", process.stderr.readline())
        assert found is not None

        def draw() -> int:
            body = {"prompt": "a ring", "num_inference_steps": 60, "stream": True}
            body["stream_steps"] = True
            request = urllib.request.Request(
                f"{found[0]}/v1/images/generations", json.dumps(body).encode()
            )
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                answer.readline()
                process.send_signal(signal.SIGTERM)
                return bytes(answer.read()).count(b"event: ")

        with ThreadPoolExecutor() as pool:
            assert pool.submit(draw).result(LIMIT) == 60  # with the picture; one line was read
        assert process.wait(LIMIT) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_sigterm_ends_a_server_that_warms_up(demo_bundle: Path) -> None:
    command = [*COMMAND, "--bundle", str(demo_bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Warming up ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) != 0
        assert "Serving" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bundle", "nothing"], "nothing"),
        (["--host", ""], "--host is empty"),
        (["--host", "256.1.1.1"], "Cannot listen at 256.1.1.1, port"),
        (["--triton", "127.0.0.1:1"], "The Triton server at 127.0.0.1:1 does not serve"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--api-keys", "/dev/null"], "/dev/null has no keys"),
    ],
)
def test_what_cannot_be_served_is_refused(options: list[str], words: str) -> None:
    done = subprocess.run(
        [*COMMAND, "--port", "0", *options], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
