"""Inputs of every component, and what an ONNX file makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exporters.checkpoint import Checkpoint
from exporters.components.chain import Chain
from exporters.components.component import Component
from exporters.components.mmdit import ONE_PIECE
from exporters.components.registry import COMPONENTS
from fluxdeploy.bundle.manifest import RopeSpec
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.sampling.rope import joint_ids, rope_tables

Array = NDArray[np.generic]

GRAPHS: dict[str, Component] = {**COMPONENTS, "one_piece": ONE_PIECE}
"""Components by the names that `exports` takes."""

# (batch, text tokens, image rows, image columns, timesteps), rows and columns of 16 pixels
SIZES = [(1, 1, 1, 1, 1), (2, 16, 3, 5, 4), (3, 7, 6, 2, 2), (1, 33, 2, 2, 7)]


def run(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def make_inputs(opened: Checkpoint, component: str, size: tuple[int, ...]) -> dict[str, Array]:
    chain, _ = GRAPHS[component].source(opened, "fp32")
    return inputs_of(chain, opened, size)


def inputs_of(chain: Chain, opened: Checkpoint, size: tuple[int, ...]) -> dict[str, Array]:
    """Random inputs of a chain: 3 tokens of a picture that is seen, and side paths of rank 2."""
    batch, text, rows, columns, steps = size
    sizes = {"B": batch, "S": text, "L": rows * columns, "T": text + rows * columns, "N": steps}
    sizes |= {"V": 3, RANK: 2}
    sizes |= {"h": 2 * rows, "w": 2 * columns, "H": 16 * rows, "W": 16 * columns}
    config = opened.transformer
    ids = joint_ids(text, rows, columns, len(config.axes_dims))
    cos, sin = rope_tables(ids, RopeSpec(config.axes_dims, config.theta))
    random = np.random.RandomState(7)
    given: dict[str, Array] = {
        "rope_cos": cos,
        "rope_sin": sin,
        "img_ids": ids[text:].astype(np.float32),
        "txt_ids": ids[:text].astype(np.float32),
    }
    tables = {"clip": opened.clip.vocab_size, "t5": opened.t5.vocab_size}
    vocabulary = tables.get(chain.component, 0)
    for spec in chain.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype == "int32":
            given[spec.name] = random.randint(0, vocabulary, shape).astype(np.int32)
        elif spec.name == "timestep":
            given[spec.name] = random.uniform(0.05, 1, shape).astype(np.float32)
        elif spec.name == "guidance":
            given[spec.name] = random.uniform(1, 5, shape).astype(np.float32)
        elif spec.name not in given:
            given[spec.name] = random.standard_normal(shape).astype(np.float32)
    return {spec.name: given[spec.name] for spec in chain.inputs}


def error(found: Array, expected: Array) -> float:
    """max|found - expected| / max|expected|"""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())
