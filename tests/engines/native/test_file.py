"""The file of a native engine: what is written comes back, and what is broken is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from engines.native.check import check_plan
from engines.native.file import read_engine
from engines.native.pack import write_engine
from engines.native.plan import Packed, Part, Plan
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.errors import EngineError
from fluxdeploy.progress import Progress
from tests.support.native_file import SMALL_PLAN, SMALL_TENSORS, write_small_engine
from tests.support.native_plan import load_tensors

QUIET = Progress(quiet=True)
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def model_of(**arrays: Any) -> ir.Model:
    """A graph of initializers alone."""
    values = [
        ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def weights() -> dict[str, Any]:
    random = np.random.RandomState(3)
    return {
        "wide": random.standard_normal((6, 4)).astype(BF16),
        "narrow": random.standard_normal((4, 6)).astype(E4M3),
        "scale": random.uniform(0.5, 2, 6).astype(BF16),
        "columns": np.exp2(random.randint(-3, 3, 4)).astype(BF16),
        "vector": random.standard_normal(6).astype(np.float32),
    }


def packed_as(tmp_path: Path, weights: dict[str, Any], **packed: Packed) -> dict[str, Any]:
    """What the file has for packed tensors, beside those of the small plan."""
    given = {f"zeros.{name}": zeros(kind, shape) for name, (kind, shape) in SMALL_TENSORS.items()}
    others = [
        Packed(name, shape, kind, (Part(f"zeros.{name}"),))
        for name, (kind, shape) in SMALL_TENSORS.items()
    ]
    plan = replace(SMALL_PLAN, packed=(*others, *packed.values()))
    write_engine(tmp_path / "e", plan, model_of(**weights, **given), {}, {}, QUIET)
    return load_tensors(read_engine(tmp_path / "e"))


def zeros(kind: str, shape: tuple[int, ...]) -> Any:
    return np.zeros(shape, {"fp8": E4M3, "bf16": BF16, "f32": np.float32}[kind])


def test_weights_lie_one_below_the_other(tmp_path: Path, weights: dict[str, Any]) -> None:
    """Transposed, dequantized and multiplied as their parts say."""
    parts = (Part("wide"), Part("narrow", "scale", transpose=True, columns="columns"))
    found = packed_as(
        tmp_path,
        weights,
        weight=Packed("weight", (12, 4), "bf16", parts),
        bytes=Packed("bytes", (6, 4), "fp8", (Part("narrow", transpose=True),)),
        scale=Packed("scale", (12,), "f32", (Part("scale", factor=0.5), Part("vector"))),
    )
    wide = {name: array.astype(np.float32) for name, array in weights.items()}
    exact = wide["narrow"].T * wide["scale"][:, None] * wide["columns"]
    np.testing.assert_array_equal(found["weight"][:6], weights["wide"])
    np.testing.assert_array_equal(found["weight"][6:], exact.astype(BF16))
    np.testing.assert_array_equal(found["bytes"], weights["narrow"].T)
    np.testing.assert_array_equal(found["scale"][:6], wide["scale"] / 2)
    np.testing.assert_array_equal(found["scale"][6:], wide["vector"])


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    given = {name: zeros(kind, shape) for name, (kind, shape) in SMALL_TENSORS.items()}
    packed = [Packed(n, shape, kind, (Part(n),)) for n, (kind, shape) in SMALL_TENSORS.items()]
    plan = replace(SMALL_PLAN, packed=tuple(packed))
    cubins = {"norm": b"\x7fELF", "linear": bytes(300)}
    write_engine(path, plan, model_of(**given), cubins, {"sm": "90"}, QUIET)
    file = read_engine(path)
    assert file.plan == SMALL_PLAN
    assert file.metadata == {"sm": "90"}
    assert file.cubins() == cubins
    assert {name: (t.kind, t.shape) for name, t in file.tensors.items()} == SMALL_TENSORS
    assert all(tensor.offset % 256 == 0 for tensor in file.tensors.values())
    assert file.data_offset + file.data_size <= path.stat().st_size
    first = path.read_bytes()
    write_engine(path, plan, model_of(**given), cubins, {"sm": "90"}, QUIET)
    assert path.read_bytes() == first


def test_every_plan_survives_json() -> None:
    assert Plan.from_json(SMALL_PLAN.to_json()) == SMALL_PLAN


def test_a_file_is_read_with_numpy_alone(tmp_path: Path) -> None:
    path = write_small_engine(tmp_path / "engine")
    blocked = ("torch", "onnx", "onnx_ir", "ml_dtypes", "safetensors", "onnxruntime")
    program = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    program += f"from engines.native.file import read_engine\nread_engine({str(path)!r}).cubins()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_end_before_the_last_weight_leaves_nothing(tmp_path: Path) -> None:
    """An error in the middle of writing, as Ctrl-C is one."""
    plan = replace(SMALL_PLAN, packed=(Packed("a", (6,), "f32", (Part("a"),)),))

    class Ended(Progress):
        def task(self, *_: Any, **__: Any) -> Any:
            task = super().task("", 1)
            task.advance = self.end  # type: ignore[method-assign]
            return task

        def end(self, _: float = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_engine(
            tmp_path / "e", plan, model_of(a=np.zeros(6, np.float32)), {}, {}, Ended(quiet=True)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    model = model_of(a=np.zeros(6, np.float32))
    outside = ir.ExternalTensor(
        "gone.safetensors",
        offset=0,
        length=24,
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape((6,)),
        name="a",
        base_dir=tmp_path,
    )
    model.graph.initializers["a"].const_value = outside
    plan = replace(SMALL_PLAN, packed=(Packed("a", (6,), "f32", (Part("a"),)),))
    with pytest.raises(
        EngineError, match=r"weight a cannot be read: No such file.*Export it again"
    ):
        write_engine(tmp_path / "e", plan, model, {}, {}, QUIET)
    (tmp_path / "gone.safetensors").write_bytes(bytes(20))
    with pytest.raises(EngineError, match=r"gone\.safetensors is too short"):
        write_engine(tmp_path / "e", plan, model, {}, {}, QUIET)
    assert not (tmp_path / "e").exists()


def damaged(value: Any) -> Iterator[Any]:
    """JSON in which one entry, however deep, is what it can never be."""
    for key in value if isinstance(value, dict) else range(len(value)):
        entry = value[key]
        others: list[Any] = ["nothing", [[]], {"a": 1}, True, 1e400 if entry is None else None]
        if isinstance(entry, (dict, list)):
            others += damaged(entry)
        elif isinstance(entry, float):
            others += [0.0, -1.0]
        elif isinstance(entry, int):
            others += [-1, 10**9, entry + 0.5]
        for other in others:
            if other is not entry:
                copy: Any = value.copy()
                copy[key] = other
                yield copy


def test_a_plan_that_does_not_fit_is_refused() -> None:
    """Every number and name of it: a GPU would read or write past its memory."""
    count = 0
    for plain in damaged(json.loads(SMALL_PLAN.to_json())):
        count += 1
        with pytest.raises((EngineError, ValueError)):
            check_plan(Plan.from_json(json.dumps(plain)), SMALL_TENSORS)
    assert count > 900


@pytest.mark.parametrize("name", SMALL_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    kind, shape = SMALL_TENSORS[name]
    for other in ((kind, (*shape[:-1], shape[-1] * 2)), ("bf16", shape)):
        tensors: Any = {**SMALL_TENSORS, name: other}
        path = write_small_engine(tmp_path / "e", tensors=tensors)
        with pytest.raises(EngineError, match=f"{path} is no engine .*{name}.*Build it again"):
            read_engine(path)
    tensors = {key: value for key, value in SMALL_TENSORS.items() if key != name}
    with pytest.raises(EngineError, match=f"{name} of {kind} .*, and has None"):
        read_engine(write_small_engine(tmp_path / "e", tensors=tensors))


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = write_small_engine(tmp_path / "engine")
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(EngineError, match=f"{path} is no engine of the native runtime"):
            read_engine(path)
    with pytest.raises(EngineError, match=r"gone is no engine .* No such file"):
        read_engine(tmp_path / "gone")


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with TensorFileWriter(path, [("a", "F32", (2,))]) as writer:
        writer.write(bytes(8))
    with pytest.raises(EngineError, match="it has no plan"):
        read_engine(path)
    declared = [("a", "F32", (2,)), ("b", "F32", (2,))]
    with TensorFileWriter(path, declared, {"plan": SMALL_PLAN.to_json()}) as writer:
        writer.write(bytes(8))
        writer.write(bytes(8))
    with pytest.raises(EngineError, match="b begins at byte 8, no multiple of 256"):
        read_engine(path)


def test_a_file_that_is_cut_off_later_is_refused(tmp_path: Path) -> None:
    path = write_small_engine(tmp_path / "engine")
    file = read_engine(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"cubin\.norm.* is not whole"):
        file.cubins()
