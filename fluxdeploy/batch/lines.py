"""The lines of a batch: JSON lines, a table with commas, or a prompt a line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fluxdeploy.batch.order import COLUMNS
from fluxdeploy.bundle.files import read_whole
from fluxdeploy.bundle.typed_json import load_strict
from fluxdeploy.errors import UsageError

__all__ = ["STDIN", "Line", "read_lines"]

STDIN = "-"
"""The name of standard input."""

_MAX_BYTES = 256 << 20
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Line:
    """One request of a file.

    number: which request it is, from 1; blank lines do not count. place: file and line, for
    messages. values: by column; where the line cannot be read there are none, but a `problem`.
    """

    number: int
    place: str
    values: Mapping[str, Any]
    problem: str | None = None


def read_lines(source: str) -> list[Line]:
    """The lines of a file, or of standard input.

    The first line that is not blank decides: `{` begins JSON lines, names of columns a table, and
    anything else is a prompt. Raises `UsageError` for a file that has no lines, or is no text, and
    `OSError`.
    """
    name = "standard input" if source == STDIN else source
    if source == STDIN:
        data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
        data = read_whole(source, _MAX_BYTES)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{name} has more than {_MAX_BYTES >> 20} MiB. Divide it.")
    text = _decoded(data, name)
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        raise UsageError(f"{name} has no prompts. Write one a line.")
    if first.lstrip().startswith("["):
        raise UsageError(
            f"{name} begins with [. Write one JSON object a line, without a list around them."
        )
    if first.lstrip().startswith("{"):
        return list(_json_lines(text, name))
    delimiter = _delimiter(first)
    if delimiter is not None:
        return list(_table(text, name, delimiter))
    return [
        Line(number, place, {"prompt": line})
        for number, (place, line) in enumerate(_not_blank(text, name), 1)
    ]


def _decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{name}, line {line} is not UTF-8 text. Save the file as UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{name}, line {line} is not text. Save the file as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_blank(text: str, name: str) -> Iterator[tuple[str, str]]:
    for row, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name}, line {row}", line.strip()


def _json_lines(text: str, name: str) -> Iterator[Line]:
    for number, (place, line) in enumerate(_not_blank(text, name), 1):
        try:
            values = load_strict(line)
        except ValueError as error:
            yield Line(number, place, {}, f"It is not JSON: {error}.")
            continue
        if isinstance(values, dict):
            yield Line(number, place, values)
        else:
            yield Line(number, place, {}, 'It is not an object such as {"prompt": "a fox"}.')


def _delimiter(first: str) -> str | None:
    """What separates the columns of a head line; None where it is a prompt."""
    for delimiter in _DELIMITERS:
        cells = _cells(first, delimiter)
        # A single column is a table too, where it has the one name that each needs.
        if "prompt" in cells and all(cell in COLUMNS for cell in cells):
            return delimiter
        if len(cells) > 2 and "prompt" in cells:
            return delimiter  # its unknown columns are named, line by line
    return None


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"').replace("-", "_") for cell in line.split(delimiter)]


def _table(text: str, name: str, delimiter: str) -> Iterator[Line]:
    reader = csv.reader(text.split("\n"), delimiter=delimiter, strict=True)
    head: list[str] = []
    number = 0
    while True:
        row = reader.line_num + 1
        place = f"{name}, line {row}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(number + 1, place, {}, f"It is no line of a table: {error}.")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not head:
            head = [cell.strip() for cell in cells]
            continue
        number += 1
        if len(cells) > len(head) or len(set(head)) < len(head):
            problem = f"It has {len(cells)} cells under {len(set(head))} different columns."
            yield Line(number, place, {}, problem)
        else:
            yield Line(number, place, dict(zip(head, cells, strict=False)))
