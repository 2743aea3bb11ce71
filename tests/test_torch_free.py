"""The host makes pictures where torch, transformers and the exporters' tools cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

_BLOCKED = ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")

_PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ImportError
from fluxdeploy.cli import main
main(sys.argv[1:])
"""


_HOST_ALONE = (*_BLOCKED, "safetensors", "sentencepiece", "rich", "click")

_HOST_PACKAGES = {"numpy", "PIL", "tokenizers", "onnxruntime"}
"""All that a picture takes besides Python itself."""

_HOST_PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
before = set(sys.modules)
from PIL import Image
from fluxdeploy import FluxPipeline
from fluxdeploy.install import install_command
with FluxPipeline.from_bundle(sys.argv[1]) as pipe:
    (first,) = pipe("a red circle", seed=3, num_inference_steps=6).images
    first.save("first.png")
    (second,) = pipe("a blue star", image=first, strength=0.7, seed=3, num_inference_steps=6).images
    second.save("second.png")
for name in sys.modules.keys() - before:
    if "site-packages" in (getattr(sys.modules[name], "__file__", None) or ""):
        print(name.partition(".")[0])
"""


def run_without_torch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_program(_PROGRAM.format(blocked=_BLOCKED), *arguments, cwd=cwd)


def run_program(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_picture_is_made_without_torch(demo_bundle: Path, tmp_path: Path) -> None:
    result = run_without_torch(
        "generate", "a red circle", "--bundle", str(demo_bundle), "--seed", "3", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    picture = Image.open(tmp_path / "image.png")
    assert picture.size == (128, 128)
    # A model draws something; a failed one draws one colour.
    assert max(high - low for low, high in picture.getextrema()) > 30


def test_the_host_alone_makes_pictures(demo_bundle: Path, tmp_path: Path) -> None:
    program = _HOST_PROGRAM.format(blocked=_HOST_ALONE)
    result = run_program(program, str(demo_bundle), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("first.png", "second.png"):
        picture = Image.open(tmp_path / name)
        assert max(high - low for low, high in picture.getextrema()) > 30
    assert set(result.stdout.split()) == _HOST_PACKAGES


def test_building_without_torch_names_the_extra(tmp_path: Path) -> None:
    result = run_without_torch("build", cwd=tmp_path)
    assert result.returncode == 1
    assert "'.[export]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_verifying_without_torch_checks_files_and_engines(
    demo_bundle: Path, tmp_path: Path
) -> None:
    result = run_without_torch("verify", "--bundle", str(demo_bundle), "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["components"]) == 6
    assert report["passed"]
    assert report["pictures"] is None
