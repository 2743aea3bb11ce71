"""The same seed gives the same picture: in one pipeline, in another, and in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fluxdeploy.host.pipeline import FluxPipeline

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]

ARGUMENTS = {
    "prompt": ["A huge wooden robot", "A red fox on a sandy beach"],
    "height": 48,
    "width": 80,
    "num_inference_steps": 3,
    "seed": 11,
    "max_sequence_length": 64,
    "output_type": "np",
}


def digest(images: object) -> str:
    return hashlib.sha256(np.asarray(images).tobytes()).hexdigest()


def test_a_second_call_gives_the_same_bytes(open_pipeline: Callable[..., FluxPipeline]) -> None:
    pipe = open_pipeline("dev")
    first = digest(pipe(**ARGUMENTS).images)
    pipe("Something else", height=32, width=32, num_inference_steps=2, seed=3)
    assert digest(pipe(**ARGUMENTS).images) == first


def test_a_fresh_process_gives_the_same_bytes(
    open_pipeline: Callable[..., FluxPipeline], bundle: Callable[..., Path]
) -> None:
    expected = digest(open_pipeline("dev")(**ARGUMENTS).images)
    code = f"""
import hashlib
from fluxdeploy import FluxPipeline
images = FluxPipeline.from_bundle({str(bundle("dev"))!r})(**{ARGUMENTS!r}).images
print(hashlib.sha256(images.tobytes()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == expected, done.stderr


def test_another_seed_gives_another_picture(open_pipeline: Callable[..., FluxPipeline]) -> None:
    pipe = open_pipeline("dev")
    other = pipe(**{**ARGUMENTS, "seed": 12}).images
    assert digest(pipe(**ARGUMENTS).images) != digest(other)
