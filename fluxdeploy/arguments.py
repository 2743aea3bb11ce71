"""Arguments of callers, checked in one way: what has the wrong kind or is out of range is refused.

A caller may pass anything; a check never fails with another error than `UsageError`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fluxdeploy.errors import UsageError

__all__ = ["check_flag", "check_integer", "check_number", "check_path", "one_for_each", "shown"]

_SHOWN = 60
"""Characters of a value in a message."""


def check_integer(
    name: str, value: object, least: int | None = 1, most: int | None = None, unit: str = ""
) -> int:
    """An integer of Python or NumPy from `least` to `most`, as Python's.

    A bound that is None is none. unit: what the numbers count, in words. Raises `UsageError` for
    anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UsageError(f"`{name}` must be an integer, not {shown(value)}.")
    if (least is not None and value < least) or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        unit = f" {unit}" if unit else ""
        raise UsageError(f"`{name}` is {shown(value)}; it must be {allowed}{unit}.")
    return int(value)


def check_number(name: str, value: object, least: float, most: float) -> float:
    """A number of Python or NumPy from `least` to `most`, as Python's.

    Raises `UsageError` for anything else, NaN and infinities too.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise UsageError(f"`{name}` must be a finite number, not {shown(value)}.")
    if isinstance(value, (float, np.floating)) and not math.isfinite(value):
        raise UsageError(f"`{name}` must be a finite number, not {shown(value)}.")
    if not least <= value <= most:
        raise UsageError(
            f"`{name}` is {shown(value)}; it must be from {_number(least)} to {_number(most)}."
        )
    return float(value)


def one_for_each(name: str, value: object, count: int, beside: str) -> list[Any]:
    """What is given for each of `count` things: one for all, or a list or array with one for each.

    beside: the end of the sentence that refuses another number of entries. Raises `UsageError`.
    """
    if not isinstance(value, (list, tuple)) and not (isinstance(value, np.ndarray) and value.ndim):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise UsageError(f"`{name}` has {len(values)} entries{beside}")
    return values


def check_flag(name: str, value: object) -> bool:
    """True or False. Raises `UsageError` for anything else."""
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"`{name}` must be True or False, not {shown(value)}.")
    return bool(value)


def check_path(name: str, value: object) -> Path:
    """A path of a file or folder. Raises `UsageError` for what cannot be one."""
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"`{name}` must be a path, not {shown(value)}.")
    try:
        path = Path(value)
        possible = b"\0" not in os.fsencode(path)
    except Exception:  # noqa: BLE001 - a path is anything that says it is one
        possible = False
    if not possible:
        raise UsageError(f"`{name}` is {shown(value)}, which no file can be called.")
    return path


def shown(value: object) -> str:
    """A value in a message: on one line and cut, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - anybody's class, and integers of thousands of digits
        return f"a value of the type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
