"""What an ONNX file reads beside itself, told from its bytes before a runtime sees them.

A graph names the files of its weights, and a runtime reads whatever it names. The base install has
no package of ONNX, so the protocol buffers are walked here. The walk is stricter than any parser:
it looks at every occurrence of a field where a parser keeps the last one, and refuses what no tool
writes (groups, numbers in more bytes than they need). So a parser cannot see a file that it has not
seen. See https://protobuf.dev/programming-guides/encoding/ and onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import ComponentRecord
from fluxdeploy.bundle.paths import path_problem
from fluxdeploy.errors import BundleError

__all__ = ["MESSAGES", "GraphFiles", "check_graph", "find_files"]

MESSAGES: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""The fields, by their numbers, through which a model reaches a tensor's external data."""

_OPERATOR = 4
"""`NodeProto.op_type`."""
_KEY, _VALUE = 1, 2
"""Of `StringStringEntryProto`."""

_MAX_DEPTH = 64
"""Messages within messages: a graph within an If within a Loop takes 12."""
_MAX_FIELDS = 1_000_000
"""FLUX.1's largest graph has less than half. This bounds the time to two seconds."""

_LOADING = frozenset({"EPContext"})
"""Operators that read files of their own: the compiled engine of a provider."""


@dataclass(frozen=True)
class GraphFiles:
    """The locations of all external data in a model, and the types of all its operators."""

    locations: frozenset[bytes]
    operators: frozenset[bytes]


def find_files(data: bytes) -> GraphFiles:
    """Look through a serialized `ModelProto`.

    Raises `ValueError`, saying what is wrong, for bytes that are none, or none that tools write.
    """
    if data[4:8] == b"ORTM":
        raise ValueError("it is a model in ONNX Runtime's own format")
    locations: set[bytes] = set()
    operators: set[bytes] = set()
    waiting = [("ModelProto", 0, len(data), 1)]
    left = _MAX_FIELDS
    while waiting:
        message, start, end, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"its messages are nested more than {_MAX_DEPTH} deep")
        inner = MESSAGES.get(message, {})
        keys: list[bytes] = []
        values: list[bytes] = []
        for number, begin, stop in _fields(data, start, end):
            left -= 1
            if left < 0:
                raise ValueError(f"it has more than {_MAX_FIELDS} fields")
            if number in inner:
                waiting.append((inner[number], begin, stop, depth + 1))
            elif message == "NodeProto" and number == _OPERATOR:
                operators.add(data[begin:stop])
            elif message == "StringStringEntryProto" and number in (_KEY, _VALUE):
                (keys if number == _KEY else values).append(data[begin:stop])
        if b"location" in keys:
            locations.update(values or [b""])
    return GraphFiles(frozenset(locations), frozenset(operators))


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each field of a message: its number, and where its value begins and ends.

    The number of a field without a length is given as 0: nothing is in it.
    """
    place = start
    while place < end:
        tag, place = _varint(data, place, end)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag >> 32:
            raise ValueError("it has a field without a number")
        if kind == 2:
            size, place = _varint(data, place, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        elif kind == 0:
            size, (_, place) = 0, _varint(data, place, end)
        else:
            raise ValueError("it has a field of an unknown kind, or is no ONNX model")
        if size > end - place:
            raise ValueError("it is cut off, or no ONNX model")
        yield number if kind == 2 else 0, place, place + size
        place += size


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """A number of base 128, and the place after it."""
    value = shift = 0
    while place < end:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift:
                raise ValueError("it has a number in more bytes than it needs")
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("it has a number of more than 64 bits")
    raise ValueError("it is cut off, or no ONNX model")


def check_graph(bundle: Bundle, record: ComponentRecord, path: str) -> None:
    """Refuse a component's ONNX file that reads what the manifest does not list.

    Raises `BundleError`, naming the graph and the location.
    """
    graph = bundle.path(path)
    rebuild = "Build the bundle again with `fluxdeploy build`, or get it from whom you trust."
    if not path.endswith(".onnx"):
        raise BundleError(f"{graph} cannot be opened as a graph: it is no .onnx file. {rebuild}")
    file = next(file for file in record.files if file.path == path)
    try:
        found = find_files(bundle.read(file))
    except ValueError as error:
        raise BundleError(f"{graph} cannot be opened as a graph: {error}. {rebuild}") from error
    recorded = {file.path for file in record.files}
    for location in sorted(found.locations):
        problem = _location_problem(path, location, recorded)
        if problem is not None:
            raise BundleError(
                f"{graph} takes weights from {location.decode('utf-8', 'replace')!r}, which "
                f"{problem}, so it is not opened. {rebuild}"
            )
    for operator in sorted(found.operators & {name.encode() for name in _LOADING}):
        raise BundleError(
            f"{graph} has the operator {operator.decode()}, which reads files of its own, so it is "
            f"not opened. {rebuild}"
        )


def _location_problem(path: str, location: bytes, recorded: set[str]) -> str | None:
    try:
        relative = location.decode("utf-8")
    except UnicodeDecodeError:
        return "is no UTF-8 text"
    if (problem := path_problem(relative)) is not None:
        return problem
    if (PurePosixPath(path).parent / relative).as_posix() not in recorded:
        return "is not among the component's files in the manifest"
    return None
