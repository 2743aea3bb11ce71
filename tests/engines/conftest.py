"""A bundle of one tiny component: y[B,T,4] = x[B,T,4] · scale[B,4] + bias[4]."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from engines import EngineSource
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    FileRecord,
    TensorSpec,
)
from fluxdeploy.precision import PRECISIONS

INPUTS = (
    TensorSpec("x", "float32", ("B", "T", 4)),
    TensorSpec("scale", "float32", ("B", 4)),
    TensorSpec("ids", "int32", ("B",)),
)
OUTPUTS = (TensorSpec("y", "float32", ("B", "T", 4)),)
RANGES = {"B": DimensionRange(1, 1, 8), "T": DimensionRange(1, 2, 16)}
BIAS = np.array([1, 2, 3, 4], np.float32)

Make = Callable[..., Any]


def expected(x: Any, scale: Any, ids: Any) -> Any:
    return x * scale[:, None] + BIAS + ids.astype(np.float32)[:, None, None]


def arrays(batch: int = 2, tokens: int = 3, seed: int = 0) -> dict[str, Any]:
    random = np.random.RandomState(seed)
    return {
        "x": random.standard_normal((batch, tokens, 4)).astype(np.float32),
        "scale": random.standard_normal((batch, 4)).astype(np.float32),
        "ids": random.randint(0, 9, batch).astype(np.int32),
    }


def record(*engines: EngineRecord) -> ComponentRecord:
    file = FileRecord("tiny.onnx", 0, "0" * 64)
    return ComponentRecord(
        key="0" * 64,
        precision="fp32",
        compute="fp32",
        inputs=INPUTS,
        outputs=OUTPUTS,
        files=(file,),
        engines=engines,
        golden=None,
    )


def engine_record(runtime: str = "onnxruntime", target: str = "cpu") -> EngineRecord:
    return EngineRecord(runtime, "1", target, "tiny.onnx", RANGES)


def source(
    component: str,
    precision: str,
    onnx: Path,
    inputs: tuple[TensorSpec, ...],
    quantized: int = 0,
    attentions: int = 0,
    weight_bytes: int = 0,
) -> EngineSource:
    """What is to be built, around bfloat16 where it is quantized."""
    row = PRECISIONS[precision]
    return EngineSource(
        component,
        row,
        precision if row.quantization is None else "bf16",
        onnx,
        inputs,
        quantized,
        attentions,
        one_head=False,
        weight_bytes=weight_bytes,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Make:
    """`bundle(*engines)`: what `open_engine` reads of a bundle, with one component, `tiny`."""

    def make(*engines: EngineRecord) -> Any:
        constants = {
            "bias": BIAS,
            "one": np.array([1], np.int64),
            "ones": np.array([1, 2], np.int64),
        }
        nodes = [
            helper.make_node("Unsqueeze", ["scale", "one"], ["scales"]),
            # Changes nothing, as where a type is computed in that the tensor has already.
            helper.make_node("Cast", ["x"], ["copy"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["copy", "scales"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["sum"]),
            helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["numbers", "ones"], ["offset"]),
            helper.make_node("Add", ["sum", "offset"], ["y"]),
        ]
        kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        inputs, outputs = (
            [helper.make_tensor_value_info(s.name, kinds[s.dtype], s.shape) for s in specs]
            for specs in (INPUTS, OUTPUTS)
        )
        initializers = [numpy_helper.from_array(a, name) for name, a in constants.items()]
        graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(model, tmp_path / "tiny.onnx")
        data = (tmp_path / "tiny.onnx").read_bytes()
        file = FileRecord("tiny.onnx", len(data), hashlib.sha256(data).hexdigest())
        tiny = replace(record(*(engines or (engine_record(),))), files=(file,))
        manifest: Any = SimpleNamespace(components={"tiny": tiny})
        return Bundle(tmp_path, manifest, "")

    return make
