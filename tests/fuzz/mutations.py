"""Strategies of hypothesis that damage real files: in their bytes, in their JSON, in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

__all__ = ["EXTREMES", "damaged_bytes", "damaged_json", "damaged_one_of"]

Draw = Callable[..., Any]

_TOKENS = (
    b"99999999999999999999", b"-1", b"0", b"NaN", b"-Infinity", b"1e999", b"true", b"null", b'"',
    b"\\", b"[" * 2000, b'{"a":' * 500, b"\\ud800", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\x1b[2J", b"../" * 20, b"/etc/passwd", b",", b"9" * 5000, b"\xe2\x80\xae",
)  # fmt: skip

_LENGTHS = (0, 1, 7, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)

EXTREMES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**9, 10**12, 10**30, -(10**18),
    0.5, -0.0, 1e-300, 1e300, 1e308, float("nan"), float("inf"), True, False, None, "", " ", "0",
    "x" * 5000, "\x00", "\x1b[31m", "../../etc/passwd", "/etc/passwd", "\u202e", "\ud800", [], {},
    [0], [None], {"": 0}, {"a": {}}, [[[[]]]], [0] * 3000, [-1, 10**12], [""] * 1000,
)  # fmt: skip

_place = st.integers(0, 2**20)


@st.composite
def damaged_bytes(draw: Draw, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with one to four places damaged."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(_place) % (len(data) + 1)
        end = start + draw(st.sampled_from((1, 2, 4, 8, 50, 1000)))
        match draw(st.integers(0, 9)):
            case 0:
                data[start : start + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[start : start + 1] = bytes(
                    byte ^ (1 << draw(st.integers(0, 7))) for byte in data[start : start + 1]
                )
            case 2:
                del data[start:]
            case 3:
                del data[start:end]
            case 4:
                data[start:start] = data[start:end] * draw(st.sampled_from((1, 2, 100)))
            case 5:
                other = draw(st.sampled_from(seeds))
                begin = draw(_place) % (len(other) + 1)
                data[start:end] = other[begin : begin + (end - start)]
            case 6:
                data[start:start] = draw(st.sampled_from(_TOKENS))
            case 7:
                _replace_number(draw, data)
            case 8:
                order = draw(st.sampled_from(("little", "big")))
                size = draw(st.sampled_from((2, 4, 8)))
                number = draw(st.sampled_from(_LENGTHS)) % 2 ** (8 * size)
                start = draw(st.sampled_from((0, start)))
                data[start : start + size] = number.to_bytes(size, order)
            case 9:
                data += bytes(draw(st.sampled_from((1, 8, 100_000))))
    return bytes(data)


def _replace_number(draw: Draw, data: bytearray) -> None:
    start = draw(_place) % (len(data) + 1)
    found = re.compile(rb"-?\d+(\.\d+)?").search(data, start)
    if found:
        number = draw(st.sampled_from([x for x in EXTREMES if type(x) in (int, float)]))
        data[found.start() : found.end()] = json.dumps(number).encode()


class _Twice(dict[str, Any]):
    """An object of which JSON text has one key twice."""

    def __init__(self, plain: dict[str, Any], key: str, value: Any) -> None:
        super().__init__(plain)
        self._extra = (key, value)

    def items(self) -> Any:
        return [*super().items(), self._extra]


@st.composite
def damaged_json(draw: Draw, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, which are JSON, with one to four of its values damaged."""
    value = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        value = _damaged(draw, value)
    # Python's own writer of text takes `items` as they come.
    text = "".join(json.JSONEncoder(indent=draw(st.sampled_from((None, 1)))).iterencode(value))
    return text.encode("utf-8", "surrogatepass")


def _damaged(draw: Draw, value: Any) -> Any:
    """A walk from the top to some node, which is damaged in its place."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 11)) == 0:
        return draw(st.sampled_from(EXTREMES))
    # The first entries are as likely as a million later ones: they are the fields of records.
    place = draw(st.one_of(st.integers(0, 12), _place)) % len(value)
    if isinstance(value, list):
        match draw(st.integers(0, 7)):
            case 0:
                return value[:place]
            case 1:
                return value[:place] + [value[place]] * 3 + value[place:]
            case 2:
                return value[::-1]
            case 3:
                return [*value, draw(st.sampled_from(EXTREMES))]
        return [*value[:place], _damaged(draw, value[place]), *value[place + 1 :]]
    key = list(value)[place]
    match draw(st.integers(0, 9)):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return _Twice(value, key, draw(st.sampled_from(EXTREMES)))
        case 2:
            renamed = draw(st.sampled_from((key.upper(), f"{key} ", "", "__proto__", "x" * 3000)))
            return {renamed if k == key else k: v for k, v in value.items()}
        case 3:
            other = value[list(value)[draw(_place) % len(value)]]
            return {**value, key: other}
    return {**value, key: _damaged(draw, value[key])}


def damaged_one_of(
    files: Mapping[str, bytes], names: Sequence[str]
) -> st.SearchStrategy[dict[str, bytes]]:
    """One of the files `names`, damaged, under its name."""

    def damage(name: str) -> st.SearchStrategy[dict[str, bytes]]:
        kinds = [damaged_bytes([files[name]])]
        if name.endswith(".json"):
            kinds.append(damaged_json([files[name]]))
        return st.one_of(kinds).map(lambda data: {name: data})

    return st.sampled_from(names).flatmap(damage)
