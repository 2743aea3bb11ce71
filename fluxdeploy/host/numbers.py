"""A caller's arrays, of whatever library, as float32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import shown
from fluxdeploy.errors import UsageError

__all__ = ["as_float32", "read_numbers"]


def as_float32(values: object) -> NDArray[np.float32] | None:
    """A copy of numbers as a float32 array; None for what is no array of numbers.

    What has more digits or a larger range is rounded, to infinity where it must.
    """
    try:
        with np.errstate(over="ignore"), warnings.catch_warnings():
            # NumPy's of ragged lists, and those of other libraries' arrays.
            warnings.simplefilter("ignore")
            array = np.asarray(values)
            if array.dtype.kind not in "iuf":
                return None
            return np.array(array, np.float32, order="C")
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - an array is anything that says it is one
        return None


def read_numbers(
    name: str, values: object, shape: Sequence[int | str], of_what: str
) -> NDArray[np.float32]:
    """A copy of the argument `name` as float32 of a shape, whose names stand for any size from 1.

    of_what: ends the sentence that says which shape it must have. Raises `UsageError` for another
    shape, for NaN and infinity, and for what is no array of numbers.
    """
    wanted = f"[{', '.join(map(str, shape))}]"
    own = as_float32(values)
    if own is None:
        # NumPy has no bfloat16, and sees neither a GPU nor a graph of gradients.
        advice = " Of a PyTorch tensor give `.detach().float().cpu()`." * hasattr(values, "detach")
        raise UsageError(
            f"`{name}` must be an array of numbers {wanted}, {of_what}, not {shown(values)}."
            f"{advice}"
        )
    fits = len(own.shape) == len(shape) and all(
        found >= 1 if isinstance(size, str) else found == size
        for found, size in zip(own.shape, shape, strict=True)
    )
    if not fits:
        raise UsageError(f"`{name}` has shape {list(own.shape)}; it must be {wanted}, {of_what}.")
    if not np.isfinite(own).all():
        raise UsageError(f"`{name}` holds NaN or infinity. Give finite values.")
    return own
