"""The Triton kernels without a GPU: Triton's interpreter against NumPy, all in float32.

The interpreter multiplies bfloat16 wrongly, truncates where it stores it, loses a carry where it
rounds to E4M3, and has no inline assembly. So that numbers agree closely, every tensor is float32
here, and NARROW is 0: what a GPU does about those is measured by `benchmarks/gpu_kernels.py`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.native_plan import gelu

pytest.importorskip("triton")
pytest.importorskip("torch")

Floats = NDArray[np.float32]
ROOT = Path(__file__).parents[3]
EPSILON = 1e-6


@dataclass
class Case:
    """A launch: `numbers` and `tensors` by parameter, and the boxes of those that the TMA moves."""

    function: str
    grid: tuple[int, int]
    tensors: dict[str, Floats]
    numbers: dict[str, int | float]
    constants: dict[str, int | str]
    boxes: dict[str, tuple[int, int]] = field(default_factory=dict)


def some(seed: int, *shape: int) -> Floats:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def unwritten(*shape: int) -> Floats:
    return np.full(shape, np.nan, np.float32)


def by_stream(case: Case, text: str, image: str) -> Any:
    """A number for each row."""
    rows = case.numbers.get("rows", case.grid[0])
    is_text = np.arange(rows) < case.numbers["text_tokens"]
    return np.where(is_text, case.numbers[text], case.numbers[image])


def convert() -> Case:
    """10 of 12 columns, to rows of 16."""
    return Case(
        "convert",
        (5, 1),
        {"x": some(1, 5, 12), "out": unwritten(5, 16)},
        {"text_tokens": 2, "inverse_text": 0.5, "inverse_image": 3.0},
        {"COLUMNS": 10, "X_STRIDE": 12, "OUT_STRIDE": 16, "BLOCK": 16},
    )


def expect_convert(case: Case) -> dict[str, Floats]:
    out = case.tensors["out"].copy()
    out[:, :10] = case.tensors["x"][:, :10] * inverse_of(case)
    return {"out": out}


def inverse_of(case: Case) -> Any:
    return by_stream(case, "inverse_text", "inverse_image")[:, None].astype(np.float32)


def norm() -> Case:
    """A width that is no power of 2, to wider rows."""
    return Case(
        "norm",
        (5, 1),
        {"x": some(2, 5, 24) + 3, "out": unwritten(5, 40), "modulation": some(3, 6, 24)},
        {
            "text_tokens": 2,
            "shift_text": 5,
            "shift_image": 1,
            "gain_text": 0,
            "gain_image": 4,
            "inverse_text": 0.5,
            "inverse_image": 3.0,
        },
        {"WIDTH": 24, "OUT_STRIDE": 40, "BLOCK": 32},
    )


def expect_norm(case: Case) -> dict[str, Floats]:
    x, modulation = case.tensors["x"].astype(np.float64), case.tensors["modulation"]
    x -= x.mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + EPSILON)
    gain = modulation[by_stream(case, "gain_text", "gain_image")]
    shift = modulation[by_stream(case, "shift_text", "shift_image")]
    out = case.tensors["out"].copy()
    out[:, :24] = (x * (1 + gain) + shift) * inverse_of(case)
    return {"out": out}


def rope(parts: int) -> Case:
    """Three heads, which are no power of 2. V is left alone where there are two parts."""
    return Case(
        "rope",
        (5, parts),
        {
            "x": some(4, 5, 3 * 24),
            "out": unwritten(5, 3 * 24),
            "norms": some(5, 4, 8),
            # Of each pair of channels only the first is read.
            "cos": np.where(np.arange(8) % 2, np.nan, some(6, 5, 8)).astype(np.float32),
            "sin": np.where(np.arange(8) % 2, np.nan, some(7, 5, 8)).astype(np.float32),
        },
        {"text_tokens": 2, "factor_q": 0.25, "factor_k": 2.0, "factor_v": 3.0},
        {"WIDTH": 24, "HEAD_DIM": 8, "BLOCK_HEADS": 4},
    )


def expect_rope(case: Case) -> dict[str, Floats]:
    heads = case.tensors["x"].reshape(5, 3, 3, 8).astype(np.float64)
    out = case.tensors["out"].reshape(heads.shape).copy()
    stream = (np.arange(5) >= case.numbers["text_tokens"]) * 2
    for part in range(case.grid[1]):
        value = heads[:, part]
        if part < 2:
            value = value / np.sqrt(np.square(value).mean(-1, keepdims=True) + EPSILON)
            value = value * case.tensors["norms"][stream + part][:, None]
            c, s = (case.tensors[name][:, None, ::2] for name in ("cos", "sin"))
            a, b = value[..., ::2], value[..., 1::2]
            value = np.stack((a * c - b * s, b * c + a * s), -1).reshape(value.shape)
        factor = case.numbers[("factor_q", "factor_k", "factor_v")[part]]
        out[:, part] = value * factor
    return {"out": out.reshape(5, -1)}


ROWS, TEXT, INNER = 37, 16, 40
TILE_ROWS, TILE_COLUMNS, DEPTH = 16, 32, 16


def linear(epilogue: str, columns: int, grouped: bool, scaled: bool, text: int = TEXT) -> Case:
    """Rows and channels that divide neither tile nor depth, on fewer programs than tiles."""
    groups = 2 if grouped else 1
    split = 64 if epilogue == "split" else 0
    first = split or columns
    half = TILE_ROWS, TILE_COLUMNS // 2
    residual = epilogue == "residual"
    return Case(
        "linear",
        (4, 1),
        {
            "x": some(8, ROWS, INNER),
            "weight": some(9, groups * columns, INNER) / 6,
            "out": some(10, ROWS, first) if residual else unwritten(ROWS, first),
            "second": unwritten(ROWS, max(columns - split, 4)),
            "scale": some(11, groups * columns),
            "bias": some(12, groups * columns),
            "gate": some(13, 3, columns),
        },
        {
            "rows": ROWS,
            "text_tokens": text,
            "gate_text": 2,
            "gate_image": 1,
            "inverse_text": 0.5,
            "inverse_image": 3.0,
        },
        {
            "COLUMNS": columns,
            "INNER": INNER,
            "TILE_ROWS": TILE_ROWS,
            "TILE_COLUMNS": TILE_COLUMNS,
            "DEPTH": DEPTH,
            "EPILOGUE": epilogue,
            "SPLIT": split,
            "GROUPED": int(grouped),
            "SCALED": int(scaled),
            "FLATTEN": 0,
            "NARROW": 0,
        },
        {"x": (TILE_ROWS, DEPTH), "weight": (TILE_COLUMNS, DEPTH), "out": half, "second": half},
    )


def expect_linear(case: Case) -> dict[str, Floats]:
    given, constants = case.tensors, case.constants
    columns, split = int(constants["COLUMNS"]), int(constants["SPLIT"])
    group = np.arange(ROWS) >= case.numbers["text_tokens"]
    group = group * int(constants["GROUPED"])
    weight = given["weight"].reshape(-1, columns, INNER)[group]
    y = np.einsum("ri,rci->rc", given["x"].astype(np.float64), weight)
    if constants["SCALED"]:
        y *= given["scale"].reshape(-1, columns)[group]
    y += given["bias"].reshape(-1, columns)[group]
    inverse, epilogue = inverse_of(case), constants["EPILOGUE"]
    if epilogue == "gelu":
        return {"out": gelu(y) * inverse}
    if epilogue == "residual":
        gate = given["gate"][by_stream(case, "gate_text", "gate_image")]
        return {"out": given["out"] + gate * y}
    if epilogue == "split":
        return {"out": y[:, :split], "second": gelu(y[:, split:]) * inverse}
    return {"out": y}


UNEVEN = 88
"""Columns that end in the second half of a tile."""

SHORT = 72
"""And in the first half."""

CASES: dict[str, tuple[Case, Callable[[Case], dict[str, Floats]]]] = {
    "convert": (convert(), expect_convert),
    "norm": (norm(), expect_norm),
    "rope in place": (rope(2), expect_rope),
    "rope and a copy": (rope(3), expect_rope),
    "plain": (linear("plain", 64, False, False), expect_linear),
    "plain, scaled, uneven": (linear("plain", UNEVEN, False, True), expect_linear),
    "plain, of two streams": (linear("plain", 64, True, True), expect_linear),
    "plain, of text alone": (linear("plain", 64, True, False, text=ROWS), expect_linear),
    "plain, of the image alone": (linear("plain", 64, True, False, text=0), expect_linear),
    "gelu": (linear("gelu", 64, False, True), expect_linear),
    "gelu, of two streams, uneven": (linear("gelu", SHORT, True, True), expect_linear),
    "residual": (linear("residual", 64, False, False), expect_linear),
    "residual, of two streams, uneven": (linear("residual", UNEVEN, True, True), expect_linear),
    "split": (linear("split", 128, False, True), expect_linear),
    "split, of two streams": (linear("split", 160, True, False), expect_linear),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Floats]]:
    """The tensors of all cases afterwards, all from one process."""
    folder = tmp_path_factory.mktemp("interpreted")
    cases, results = folder / "cases", folder / "results"
    cases.write_bytes(pickle.dumps([asdict(case) for case, _ in CASES.values()]))
    command = [sys.executable, "-m", "tests.engines.native.interpret", cases, results]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, pickle.loads(results.read_bytes()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_numpy_does(
    interpreted: dict[str, dict[str, Floats]], name: str
) -> None:
    """And writes nothing else."""
    case, expect = CASES[name]
    for tensor, expected in (case.tensors | expect(case)).items():
        np.testing.assert_allclose(interpreted[name][tensor], expected, 1e-5, 1e-5, err_msg=tensor)
