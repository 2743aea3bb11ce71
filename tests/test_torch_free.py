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


def run_without_torch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(blocked=_BLOCKED), *arguments],
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


def test_building_without_torch_names_the_extra(tmp_path: Path) -> None:
    result = run_without_torch("build", cwd=tmp_path)
    assert result.returncode == 1
    assert "fluxdeploy[export]" in result.stderr
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
