"""Golden tensors: small known inputs of a component and PyTorch's float32 outputs for them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.components.chain import Chain
from fluxdeploy.bundle.manifest import DimensionRange, LatentSpec, RopeSpec, ScheduleSpec
from fluxdeploy.bundle.side_paths import RANK, is_side_input
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.schedule import sigmas

__all__ = ["golden_inputs", "golden_sizes", "write_golden"]

Array = NDArray[np.generic]

# Two rows where an engine takes them, so that a mix-up of the batch shows; a picture that is not
# square, so that rows and columns cannot be swapped unseen.
_BATCH, _TEXT, _STEPS, _ROWS, _COLUMNS = 2, 16, 2, 4, 6

_SEEN = 4
"""Of an IP-Adapter's picture, where none was made."""

_RANK = 2
"""Of a LoRA: with 16, FLUX.1's would take 260 MB."""


def golden_inputs(
    chain: Chain,
    vocabulary: int | None,
    latents: LatentSpec,
    rope: RopeSpec,
    schedule: ScheduleSpec,
    ranges: Mapping[str, DimensionRange],
    upstream: Mapping[str, Array],
) -> dict[str, Array]:
    """Inputs for a component such as a host would give it: a 64×96 picture, seeded noise.

    `upstream` are golden outputs of the components before it, where they are its inputs.

    `vocabulary` bounds the token ids of a text encoder; its last id takes the place of the
    end-of-text token. Where `ranges`, the sizes that the engine takes, begin above that picture it
    is a larger one of the same proportions, and where they begin above that text a longer one.
    """
    rows, columns = _grid(latents, ranges)
    sizes = golden_sizes(latents, ranges)
    random = np.random.RandomState(0)
    cos, sin = rope_tables(joint_ids(sizes["S"], rows, columns, len(rope.axes_dims)), rope)
    given: dict[str, Array] = {
        "rope_cos": cos,
        "rope_sin": sin,
        "timestep": sigmas(schedule, _STEPS, rows * columns)[:-1],
        "guidance": np.full(sizes["B"], 3.5, np.float32),
    }
    inputs: dict[str, Array] = {}
    for spec in chain.inputs:
        if spec.name in given:
            inputs[spec.name] = given[spec.name]
            continue
        if spec.name in upstream:
            # Of residuals, the transformer may take fewer than a ControlNet gives.
            taken = (
                sizes["B"] if d == "B" else d if isinstance(d, int) else None for d in spec.shape
            )
            inputs[spec.name] = upstream[spec.name][tuple(map(slice, taken))]
            continue
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype == "int32":
            assert vocabulary is not None
            ids = random.randint(0, vocabulary - 1, shape)
            ids[:, -1] = vocabulary - 1
            inputs[spec.name] = ids.astype(np.int32)
        else:
            values = random.standard_normal(shape)
            if is_side_input(spec.name):
                # Through both, a tenth of what a linear reads.
                values *= np.sqrt(0.1 / shape[1])
            inputs[spec.name] = values.astype(np.float32)
    return inputs


def golden_sizes(latents: LatentSpec, ranges: Mapping[str, DimensionRange]) -> dict[str, int]:
    """The size of every symbol in golden tensors, where an engine takes sizes in `ranges`."""
    rows, columns = _grid(latents, ranges)
    h, w = rows * latents.patch_size, columns * latents.patch_size
    text = max(_TEXT, ranges["S"].min) if "S" in ranges else _TEXT
    return {
        "B": min(_BATCH, ranges["B"].max) if "B" in ranges else _BATCH,
        "S": text,
        "N": _STEPS,
        "V": _SEEN,
        "L": rows * columns,
        "T": text + rows * columns,
        "h": h,
        "w": w,
        "H": h * latents.spatial_factor,
        "W": w * latents.spatial_factor,
        RANK: min(_RANK, ranges[RANK].max) if RANK in ranges else _RANK,
    }


def _grid(latents: LatentSpec, ranges: Mapping[str, DimensionRange]) -> tuple[int, int]:
    """Rows and columns of tokens of the smallest picture of 2:3 that the engine takes."""
    for factor in itertools.count(1):
        rows, columns = factor * _ROWS, factor * _COLUMNS
        least = {
            "L": rows * columns,
            "h": rows * latents.patch_size,
            "H": rows * latents.patch_size * latents.spatial_factor,
        }
        if all(size >= ranges[symbol].min for symbol, size in least.items() if symbol in ranges):
            return rows, columns
    raise AssertionError


def write_golden(
    path: Path,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    metadata: Mapping[str, str],
) -> None:
    """Write `input.*` and `output.*` to a safetensors file."""
    tensors = {f"input.{name}": array for name, array in inputs.items()}
    tensors |= {f"output.{name}": array for name, array in outputs.items()}
    kinds = {"float32": "F32", "int32": "I32"}
    declared = [(name, kinds[str(a.dtype)], a.shape) for name, a in tensors.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with TensorFileWriter(path, declared, metadata) as writer:
        for array in tensors.values():
            writer.write(np.ascontiguousarray(array))
