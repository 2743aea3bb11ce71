"""Protobuf's text format, as far as configurations of Triton need it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Enum", "Value", "render"]


@dataclass(frozen=True)
class Enum:
    """A member of an enumeration, which stands without quotes."""

    name: str


Value: TypeAlias = "str | int | bool | Enum | Mapping[str, Value] | tuple[Value, ...]"
"""A field's value. A tuple is a repeated field, a mapping a message."""

_INDENT = "  "


def render(sections: Iterable[tuple[str, Mapping[str, Value]]]) -> str:
    """The text of a message whose fields stand in sections, each below its comment."""
    parts = []
    for comment, fields in sections:
        lines = [f"# {line}".rstrip() for line in comment.splitlines()]
        parts.append("\n".join([*lines, *_fields(fields, "")]))
    return "\n\n".join(parts) + "\n"


def _fields(fields: Mapping[str, Value], indent: str) -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, tuple) and all(isinstance(each, int) for each in value):
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Mapping):
                yield from _message(name, each, indent)
            else:
                yield f"{indent}{name}: {_scalar(each)}"


def _message(name: str, fields: Mapping[str, Value], indent: str) -> Iterator[str]:
    inner = list(_fields(fields, ""))
    line = f"{indent}{name} {{ {' '.join(inner)} }}"
    if len(line) <= 100:
        yield line
        return
    yield f"{indent}{name} {{"
    yield from _fields(fields, indent + _INDENT)
    yield f"{indent}}}"


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    assert isinstance(value, str)
    return _quoted(value)


def _quoted(text: str) -> str:
    """A string with everything but plain ASCII as octal escapes of its UTF-8."""
    plain = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
    return '"{}"'.format(
        "".join(
            plain.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
            for byte in text.encode("utf-8", "replace")
        )
    )
