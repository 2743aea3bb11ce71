"""Tensors held against a component's boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.tensors import check_inputs, output_shape
from fluxdeploy.bundle.manifest import TensorSpec
from fluxdeploy.errors import EngineError
from tests.engines.conftest import INPUTS, RANGES, arrays


def test_sizes_of_symbols_are_found() -> None:
    assert check_inputs("tiny", INPUTS, RANGES, arrays(2, 3)) == {"B": 2, "T": 3}
    assert check_inputs("tiny", INPUTS[1:], RANGES, without("x"), {"B": 2}) == {"B": 2}


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in arrays().items() if key != name}


def changed(**changes: Any) -> dict[str, Any]:
    return arrays() | changes


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (without("x"), "tensor x is missing; the inputs here are x, scale, ids"),
        (changed(z=zeros(1)), "tensor z is not one of its inputs"),
        (changed(x=zeros(2, 3, 4, dtype=np.float64)), "x is float64; float32 is needed"),
        (changed(x=zeros(2, 3, 4, dtype=np.float16)), "x is float16; float32"),
        (changed(x=zeros(2, 3, 4, dtype=">f4")), "x is >f4; float32"),
        (changed(ids=zeros(2, dtype=np.int64)), "ids is int64; int32 is needed"),
        (changed(x=zeros(2, 3, 5)), r"x has shape \[2, 3, 5\]; \[2, 3, 4\] is needed"),
        (changed(x=zeros(2, 12)), r"x has shape \[2, 12\]"),
        (changed(scale=zeros(3, 4)), r"scale has shape \[3, 4\]; \[2, 4\] is needed \(that is"),
        (arrays(9, 2), "dimension B is 9; this engine takes 1 to 8"),
        (arrays(1, 17), "dimension T is 17; this engine takes 1 to 16"),
        (arrays(1, 0), "dimension T is 0; this engine takes 1 to 16"),
    ],
)
def test_what_does_not_fit_is_named(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=f"^tiny: .*{words}"):
        check_inputs("tiny", INPUTS, RANGES, inputs)


def test_symbols_fixed_before_bind_later_tensors() -> None:
    with pytest.raises(EngineError, match=r"scale has shape \[2, 4\]; \[3, 4\] is needed"):
        check_inputs("tiny", INPUTS[1:], RANGES, without("x"), {"B": 3})


def test_output_shapes_follow_from_the_inputs() -> None:
    spec = TensorSpec("y", "float32", ("B", 3, "T"))
    assert output_shape(spec, {"B": 2, "T": 5}) == (2, 3, 5)
    assert output_shape(spec, {"B": 2}) is None
