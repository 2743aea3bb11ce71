"""A bundle with an IP-Adapter in the C++ library, which draws with it what takes no picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fluxdeploy.host.pipeline import FluxPipeline
from tests.engines.cpp.library import Library

CALL: dict[str, Any] = {
    "prompt": ["a fox", "a robot"],
    "height": 48,
    "width": 32,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "seed": 5,
}


def test_pictures_of_words_alone_are_pythons(library: Library, ip_adapter_bundle: Path) -> None:
    cpp = library.pipeline(ip_adapter_bundle)
    with FluxPipeline.from_bundle(ip_adapter_bundle, "onnxruntime") as python:
        wanted = python(**CALL).images
    found, notices, _ = cpp(**CALL)
    cpp.close()
    assert notices == []
    difference = found.astype(int) - np.stack([np.asarray(each) for each in wanted])
    assert np.abs(difference).max() <= 1
