"""Strict JSON: text into frozen dataclasses, driven by their type hints.

Nothing is guessed: an unknown, missing or mistyped field is refused, and the error names the place
in the text, for example `components.t5.files[0].path`.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = [
    "OPTIONAL",
    "FieldError",
    "join",
    "listed",
    "load_strict",
    "parse",
    "require",
    "shortened",
    "to_plain",
]

T = TypeVar("T")

OPTIONAL: Mapping[str, bool] = {"optional": True}
"""The metadata of a dataclass's field that texts may lack, which then has its default. It is left
out where it has that, so that programs read it which do not know the field."""

_MAX_DIGITS = 20
"""Enough for 64 bits; turning longer digit strings into numbers takes quadratic time."""

_MAX_VALUES = 100_000
"""A FLUX.1 with everything in one file has 12,000 in its header. More take seconds, and a hundred
times the memory of their text."""

_MAX_WORDS = 300

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class FieldError(ValueError):
    """A field holds what it must not; `where` is its place, such as `files[0].path`."""

    def __init__(self, where: str, problem: str) -> None:
        # Both may quote the text, which may be one long name or list.
        self.where = shortened(where)
        self.problem = shortened(problem)
        super().__init__(f"{self.where} {self.problem}" if where else self.problem)


def shortened(text: str) -> str:
    """`text` without its middle where it is too long for a message."""
    half = _MAX_WORDS // 2
    return text if len(text) <= _MAX_WORDS else f"{text[:half]} ... {text[-half:]}"


def join(where: str, name: str) -> str:
    """The place of the field `name` in the object at `where`."""
    return f"{where}.{name}" if where else name


def require(condition: bool, where: str, problem: str) -> None:
    """Raise `FieldError` with what is wrong at `where`, unless `condition` holds."""
    if not condition:
        raise FieldError(where, problem)


def listed(names: Mapping[str, object] | set[str] | set[int] | tuple[str, ...]) -> str:
    """Names as an error lists them: in order, `none` where there are none."""
    return ", ".join(map(str, sorted(names))) or "none"


def load_strict(text: str) -> Any:
    """JSON as Python objects, without what Python's reader is lenient about.

    Raises `ValueError` for anything that is not JSON, for NaN, infinities and numbers past a
    float's range, for integers of more than 20 digits, for duplicate keys, for strings that are
    not Unicode text (lone surrogates), for nesting too deep to read, and for more than 100,000
    values.
    """
    # Commas in strings count too: what is read here has few.
    if text.count(",") >= _MAX_VALUES:
        raise ValueError(f"it has more than the {_MAX_VALUES} values that are allowed")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shortened(repr(key))} occurs twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {shortened(digits)} is too large")
    return number


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:8]}... has {len(digits)} digits")
    return int(digits)


def parse(kind: type[T], value: object, where: str = "") -> T:
    """`value`, as read from JSON, as an instance of the dataclass `kind`.

    Understands nested dataclasses, `tuple[X, ...]`, `Mapping[str, X]`, unions, `None`, `bool`,
    `int`, `float` (a whole number counts), `str`, and `object` for free-form JSON. Raises
    `FieldError` for the first field that does not fit.
    """
    return cast(T, _parse(kind, value, where))


def _parse(kind: Any, value: Any, where: str) -> Any:
    if kind is object:
        return value
    options = [option for option in _options(kind) if _fits(option, value)]
    if not options:
        wanted = " or ".join(_wording(option) for option in _options(kind))
        raise FieldError(where, f"must be {wanted}, not {_shown(value)}")
    kind = options[0]
    if kind in (bool, int, str, types.NoneType):
        return value
    if is_dataclass(kind):
        return _parse_fields(kind, value, where)
    origin = get_origin(kind)
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(_parse(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is Mapping:
        item = get_args(kind)[1]
        return {key: _parse(item, entry, join(where, key)) for key, entry in value.items()}
    return float(value) if kind is float else value


def _parse_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    for name in value:
        if name not in hints:
            raise FieldError(join(where, name), "is not a known field")
    for each in fields(kind):
        if each.name not in value and not each.metadata.get("optional"):
            raise FieldError(join(where, each.name), "is missing")
    return kind(
        **{name: _parse(hints[name], entry, join(where, name)) for name, entry in value.items()}
    )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(kind: Any, value: Any) -> bool:
    if kind in (bool, int, str, types.NoneType):
        return type(value) is kind
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        return isinstance(value, dict)
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    raise TypeError(f"the type hint {kind!r} has no JSON form")


def _wording(kind: Any) -> str:
    if is_dataclass(kind) or get_origin(kind) is Mapping:
        return "an object"
    if get_origin(kind) is tuple:
        return "a list"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(kind, "null")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def to_plain(value: Any) -> Any:
    """A dataclass as JSON objects: fields in their own order, keys of mappings sorted.

    Sorting makes the text a function of the value: equal objects give equal bytes. Fields that are
    `OPTIONAL` are left out where they have their default.
    """
    if is_dataclass(value):
        return {
            field.name: to_plain(getattr(value, field.name))
            for field in fields(value)
            if not (field.metadata.get("optional") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {key: to_plain(value[key]) for key in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(entry) for entry in value]
    return value
