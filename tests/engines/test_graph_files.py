"""What a graph reads beside itself is found as ONNX's own parser finds it, and held to the record.

No mutated file hides a location from the walk that the parser sees.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from engines import graph_files, open_engine
from engines.graph_files import MESSAGES, find_files
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.files import FileIdentity
from fluxdeploy.bundle.manifest import FileRecord
from fluxdeploy.errors import BundleError
from tests.engines.conftest import BIAS, Make, arrays, engine_record, expected

RUNTIMES = ("onnxruntime", "openvino")


def external(name: str, location: str, **more: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(location: str) -> Any:
    return helper.make_node("Constant", [], ["c"], value=external("c", location))


def model(**parts: Any) -> Any:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    made = helper.make_model(graph)
    for part in parts.get("nodes", ()):
        made.graph.node.append(part)
    for part in parts.get("initializers", ()):
        made.graph.initializer.append(part)
    return made


def inner_graph(location: str) -> Any:
    return helper.make_graph([constant(location)], "inner", [], [], [external("i", location + "2")])


def everywhere() -> Any:
    """A model with external data at every place that has tensors."""
    sparse = onnx.SparseTensorProto(values=external("v", "a/1"), indices=external("j", "a/2"))
    made = model(initializers=[external("w", "a/3")], nodes=[constant("a/4")])
    made.graph.sparse_initializer.append(sparse)
    deep = inner_graph("a/5")
    for level in range(4):
        branch = helper.make_node("If", ["b"], ["o"], then_branch=deep)
        deep = helper.make_graph([branch], f"level{level}", [], [])
    made.graph.node.append(helper.make_node("If", ["b"], ["o"], then_branch=deep, else_branch=deep))
    node = helper.make_node("Odd", [], ["o"], domain="odd")
    node.attribute.add(name="ts", type=9).tensors.append(external("t", "a/6"))
    node.attribute.add(name="gs", type=10).graphs.append(inner_graph("a/7"))
    node.attribute.add(name="s", type=11).sparse_tensor.CopyFrom(sparse)
    node.attribute.add(name="ss", type=12).sparse_tensors.append(sparse)
    made.graph.node.append(node)
    function = helper.make_function("odd", "f", ["x"], ["y"], [constant("a/8")], [])
    function.attribute_proto.add(name="d", type=4).t.CopyFrom(external("d", "a/9"))
    made.functions.append(function)
    training = made.training_info.add()
    training.initialization.node.append(constant("a/10"))
    training.algorithm.initializer.append(external("a", "a/11"))
    return made


def seen_by_onnx(message: Any) -> Iterator[bytes]:
    """The locations in a parsed message, by ONNX's own description of it."""
    if message.DESCRIPTOR.name == "TensorProto":
        for entry in message.external_data:
            if entry.key == "location":
                # The parser gives bytes for what is no UTF-8.
                yield entry.value.encode() if isinstance(entry.value, str) else entry.value
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from seen_by_onnx(inner)


def test_the_fields_are_those_of_onnx() -> None:
    """Every field of a model through which a tensor's external data can be reached."""
    found: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        kind = waiting.pop()
        if kind.name not in found:
            inner = [field for field in kind.fields if field.message_type is not None]
            found[kind.name] = {field.number: field.message_type.name for field in inner}
            waiting += [field.message_type for field in inner]
    reaching = {"TensorProto"}
    while True:
        more = {kind for kind in found if reaching & set(found[kind].values())} | reaching
        if more == reaching:
            break
        reaching = more
    expected = {
        kind: {number: name for number, name in found[kind].items() if name in reaching}
        for kind in reaching
    }
    (entries,) = (f for f in TensorProto.DESCRIPTOR.fields if f.name == "external_data")
    expected["TensorProto"] = {entries.number: entries.message_type.name}
    assert expected == MESSAGES
    numbers = {field.name: field.number for field in entries.message_type.fields}
    assert numbers == {"key": graph_files._KEY, "value": graph_files._VALUE}
    (operator,) = (f for f in onnx.NodeProto.DESCRIPTOR.fields if f.name == "op_type")
    assert operator.number == graph_files._OPERATOR


def test_every_place_is_looked_at() -> None:
    made = everywhere()
    found = find_files(made.SerializeToString())
    assert found.locations == set(seen_by_onnx(made))
    assert len(found.locations) == 13
    assert found.operators >= {b"If", b"Odd", b"Constant", b"Identity"}


@pytest.mark.parametrize("seed", range(6))
def test_no_mutated_file_hides_a_location(seed: int) -> None:
    chance = random.Random(seed)
    whole = everywhere().SerializeToString()
    parsed = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(data))
            how = chance.randrange(4)
            if how == 0:
                data[place] = chance.randrange(256)
            elif how == 1:
                data[place] ^= 1 << chance.randrange(8)
            elif how == 2:
                del data[place : place + chance.randint(1, 4)]
            else:
                data[place:place] = chance.randbytes(chance.randint(1, 4))
        try:
            known = set(seen_by_onnx(onnx.ModelProto.FromString(bytes(data))))
        except (DecodeError, UnicodeDecodeError):
            known = set()
        try:
            found = find_files(bytes(data))
        except ValueError:
            continue
        parsed += 1
        assert known <= found.locations
    assert parsed > 10


def test_what_a_parser_would_merge_or_drop_is_looked_at_too() -> None:
    twice = external("w", "first")
    twice.external_data.add(key="location", value="second")
    made = model(initializers=[twice]).SerializeToString()
    made += model(initializers=[external("w", "third")]).SerializeToString()
    inline = external("w", "fourth")
    inline.data_location = TensorProto.DEFAULT
    made += model(initializers=[inline]).SerializeToString()
    assert find_files(made).locations == {b"first", b"second", b"third", b"fourth"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not a graph" * 50, "no ONNX model"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "cut off"),
        (b"\x3a\x05\x0a", "cut off"),
        (b"\x3b\x3c", "unknown kind"),
        (b"\x3a\x80\x00", "more bytes than it needs"),
        (b"\x02\x00", "without a number"),
        (b"\xba\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01\x00", "more than 64 bits"),
        (b"\xba\x80\x80\x80\x80\x01\x00", "without a number"),
        (b"\x20\x00\x00\x00ORTM" + bytes(100), "ONNX Runtime's own format"),
        (b"\x08\x01" * 1001, "more than 1000 fields"),
        (b"\x9d\x01abc", "cut off"),
    ],
)
def test_what_no_tool_writes_is_refused(
    data: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_MAX_FIELDS", 1000)
    with pytest.raises(ValueError, match=words):
        find_files(data)


def test_deep_nesting_is_refused() -> None:
    data = b""
    for number in (6, 5, 1) * 40:  # a graph in an attribute of a node
        size = len(data)
        data = bytes([number << 3 | 2, size & 127 | 128, size >> 7]) + data
    size = len(data)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        find_files(bytes([0x3A, size & 127 | 128, size >> 7]) + data)


def written(made: Bundle, files: dict[str, bytes]) -> Bundle:
    """The bundle `made` with these files of `tiny`, all recorded."""
    records = []
    for path, data in files.items():
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).write_bytes(data)
        records.append(FileRecord(path, len(data), hashlib.sha256(data).hexdigest()))
    tiny = made.manifest.components["tiny"]
    engines = tuple(replace(engine, path=next(iter(files))) for engine in tiny.engines)
    components: Any = made.manifest.components
    components["tiny"] = replace(tiny, files=tuple(records), engines=engines)
    return made


def graph(made: Bundle, location: str, node: Any = None) -> bytes:
    """The tiny graph, whose bias lies at `location`."""
    parsed = onnx.load(made.root / "tiny.onnx")
    (bias,) = (tensor for tensor in parsed.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(external("bias", location))
    if node is not None:
        parsed.graph.node.append(node)
    return bytes(parsed.SerializeToString())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_recorded_weights_are_read(bundle: Make, runtime: str) -> None:
    pytest.importorskip(runtime)
    made = bundle(engine_record(runtime))
    data = graph(made, "weights/bias.bin")
    made = written(made, {"onnx/tiny.onnx": data, "onnx/weights/bias.bin": BIAS.tobytes()})
    with open_engine(made, "tiny", runtime) as engine:
        assert np.allclose(engine.run(arrays())["y"], expected(**arrays()))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("weights/other.bin", "is not among the component's files"),
        ("bias.bin", "is not among the component's files"),
        ("../onnx/weights/bias.bin", "leaves the bundle"),
        ("weights/../../../secret", "leaves the bundle"),
        ("/etc/passwd", "is absolute"),
        ("C:/secret", "is absolute"),
        ("./weights/bias.bin", "has an empty part"),
        ("weights\\bias.bin", "holds a backslash"),
        ("weights/bias.bin\0.txt", "holds a control character"),
        ("*/_ORT_MEM_ADDR_/*", "is not among the component's files"),
        ("", "is empty"),
    ],
)
def test_other_weights_are_not(bundle: Make, runtime: str, location: str, problem: str) -> None:
    pytest.importorskip(runtime)
    made = bundle(engine_record(runtime))
    files = {"onnx/tiny.onnx": graph(made, location), "onnx/weights/bias.bin": BIAS.tobytes()}
    made = written(made, files)
    for name in ("weights/other.bin", "bias.bin"):
        (made.root / "onnx" / name).write_bytes(bytes(16))
    with pytest.raises(BundleError, match=problem) as caught:
        open_engine(made, "tiny", runtime)
    assert f"{made.root}/onnx/tiny.onnx takes weights from {location!r}" in str(caught.value)


@pytest.mark.parametrize("domain", ["com.microsoft", "", "odd"])
def test_operators_that_read_files_are_refused(bundle: Make, domain: str) -> None:
    made = bundle()
    context = {"ep_cache_context": "../../secret", "embed_mode": 0}
    node = helper.make_node("EPContext", ["x"], ["z"], domain=domain, **context)
    made = written(made, {"tiny.onnx": graph(made, "b", node), "b": BIAS.tobytes()})
    with pytest.raises(BundleError, match="has the operator EPContext, which reads files of its"):
        open_engine(made, "tiny")


@pytest.mark.parametrize("name", ["tiny.xml", "tiny.ort", "tiny.pb", "tiny.onnx.ort", "tiny.ONNX"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_runtimes_take_for_another_format_are_refused(
    bundle: Make, runtime: str, name: str
) -> None:
    """OpenVINO reads `tiny.bin` beside a `tiny.xml`, which nobody has named."""
    made = bundle(engine_record(runtime))
    made = written(made, {name: graph(made, "b"), "b": BIAS.tobytes()})
    with pytest.raises(BundleError, match=r"it is no \.onnx file"):
        open_engine(made, "tiny", runtime)


@pytest.mark.parametrize("place", ["tiny.onnx", "b"])
def test_an_engine_whose_files_change_while_it_is_opened_is_closed(
    bundle: Make, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    made = bundle()
    made = written(made, {"tiny.onnx": graph(made, "b"), "b": BIAS.tobytes()})
    (made.root / "fluxdeploy.json").write_bytes(b"")
    seen = {name: FileIdentity.of(made.root / name) for name in ("tiny.onnx", "b")}
    digest = hashlib.sha256(b"").hexdigest()
    opened = Bundle(made.root, made.manifest, digest, seen)
    open_engine(opened, "tiny").close()
    closed = []

    class Slow:
        def close(self) -> None:
            closed.append(True)

    def opening(self: object, *arguments: object) -> Slow:
        path: Path = made.root / place
        path.write_bytes(bytes(path.stat().st_size))
        return Slow()

    monkeypatch.setattr("engines.onnxruntime.OnnxRuntime.open", opening)
    with pytest.raises(BundleError, match="was replaced or changed since it was opened"):
        open_engine(opened, "tiny")
    assert closed == [True]
