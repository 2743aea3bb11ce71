"""No library that sends telemetry is imported before it is told not to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

HOSTS = {
    "the pipeline's engines": """
from fluxdeploy import FluxPipeline
from engines.registry import runtimes
runtimes("onnxruntime")[0].availability("cpu")
""",
    "engines alone": """
from engines.onnxruntime import OnnxRuntime
OnnxRuntime().availability("cpu")
""",
    "OpenVINO's engines": """
from engines.openvino import _core
_core()
""",
    "doctor": """
from fluxdeploy.cli.doctor import _describe_runtimes
_describe_runtimes()
""",
    "bench, optimum": """
from fluxdeploy.bench.peers.optimum import optimum_loader
optimum_loader(None)
""",
    "bench, OpenVINO": """
from fluxdeploy.bench.peers.openvino import _main
_main("", "")
""",
    "configs of text encoders": "import exporters.checkpoint.text_configs",
    "a checkpoint": "import exporters.checkpoint.checkpoint",
    "the hub": """
from exporters.checkpoint.hub import download
download("somebody/something")
""",
}
"""What imports a library, each as the first thing that a process does."""

WATCH = """
import importlib.abc, json, os, sys
import click, numpy, tokenizers

switches, hosts = json.loads(sys.argv[1])
LIBRARIES = ("onnxruntime", "openvino", "optimum", "diffusers", "transformers", "huggingface_hub")
OURS = ("fluxdeploy", "engines", "exporters")

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in LIBRARIES:
            stubbed = "openvino_telemetry" in sys.modules
            seen.append([top, {key: os.environ.get(key) for key in switches}, stubbed])
        if top in (*LIBRARIES, "torch", "onnx", "onnx_ir", "onnxscript"):
            raise ImportError(name)

sys.meta_path.insert(0, Watch())
told = {}
for host, code in hosts.items():
    seen = told[host] = []
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    for key in switches:
        os.environ.pop(key, None)
    try:
        exec(code, {})
    except Exception:
        pass
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, list[tuple[str, dict[str, str], bool]]]:
    """For each host: the libraries that it imports, and the environment that they would find."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps([SWITCHES, HOSTS])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told: dict[str, list[tuple[str, dict[str, str], bool]]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("host", HOSTS)
def test_libraries_are_told_to_send_nothing_before_they_are_imported(
    seen: dict[str, list[tuple[str, dict[str, str], bool]]], host: str
) -> None:
    assert seen[host]
    for library, environment, _ in seen[host]:
        assert environment == SWITCHES, library


def test_openvinos_converter_cannot_find_its_telemetry(
    seen: dict[str, list[tuple[str, dict[str, str], bool]]],
) -> None:
    assert ["openvino", SWITCHES, True] in seen["bench, OpenVINO"]


@pytest.mark.parametrize("value", ["0", "", "true"])
def test_what_the_user_has_set_stays(value: str) -> None:
    code = "import os, fluxdeploy; print(repr(os.environ['ORT_DISABLE_TELEMETRY']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == repr(value)
