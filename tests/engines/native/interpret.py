"""Runs Triton's kernels over host memory: `python -m tests.engines.native.interpret CASES RESULTS`.

CASES is a pickled list of `test_kernels.Case`; RESULTS becomes a list of their tensors afterwards.
Triton interprets all kernels of a process or none, from when it is imported.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run(
    function: str,
    grid: tuple[int, int],
    tensors: dict[str, Any],
    numbers: dict[str, int | float],
    constants: dict[str, int | str],
    boxes: dict[str, tuple[int, int]],
) -> dict[str, Any]:
    """What the tensors hold after a launch."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from engines.native import kernels
    from engines.native.specs import PARAMETERS

    held = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    given: dict[str, Any] = held | numbers
    for name, box in boxes.items():
        given[name] = TensorDescriptor.from_tensor(held[name], list(box))
    arguments = [given[name] for name in PARAMETERS[function]]
    getattr(kernels, function)[grid](*arguments, **constants)
    return {name: np.array(tensor) for name, tensor in held.items()}


def main(cases: str, results: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    found = [run(**case) for case in pickle.loads(Path(cases).read_bytes())]
    Path(results).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
