"""`--runtime emulate`: bundles for other machines opened on a CPU, and what it computes with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import (
    EngineOptions,
    choose_builder,
    choose_runtime,
    open_engine,
    runtimes,
)
from engines.emulate.graph import emulate
from engines.emulate.runtime import Emulate
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import DimensionRange, FileRecord, TensorSpec
from fluxdeploy.errors import BundleError, EngineError, MissingDependencyError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.install import install_command
from tests.engines.conftest import RANGES, Make, arrays, engine_record, expected, record

NUMBERS = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}

MakeGraph = Callable[..., Bundle]
"""`graph(nodes, types, (K, M), *weights)`: a bundle whose component makes y[R,M] of x[R,K]."""


def as_bundle(root: Path, model: onnx.ModelProto, *files: str, **changes: Any) -> Bundle:
    """A bundle with the engine of a GPU that is not here, and with the graph that it is of."""
    (root / "onnx").mkdir(exist_ok=True)
    onnx.save(model, root / "onnx" / "tiny.onnx")
    engine = replace(engine_record("tensorrt-rtx", "sm89"), path="engines/tiny.engine")
    tiny = replace(record(engine), files=tuple(filed(root, n) for n in ("tiny.onnx", *files)))
    manifest: Any = type("Manifest", (), {"components": {"tiny": replace(tiny, **changes)}})()
    return Bundle(root, manifest, "")


def filed(root: Path, name: str) -> FileRecord:
    data = (root / "onnx" / name).read_bytes()
    return FileRecord(f"onnx/{name}", len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def gpu_bundle(bundle: Make, tmp_path: Path) -> Bundle:
    """The tiny component, as it would be built for a GPU."""
    bundle()
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "tiny.onnx"))
    return as_bundle(tmp_path, model)


@pytest.fixture
def graph(tmp_path: Path) -> MakeGraph:
    def make(
        nodes: Sequence[onnx.NodeProto],
        types: dict[str, int],
        sizes: tuple[int, int],
        *weights: onnx.TensorProto,
        large: onnx.TensorProto | None = None,
    ) -> Bundle:
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", size])
            for name, size in zip("xy", sizes, strict=True)
        )
        values = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
        made = helper.make_graph(nodes, "tiny", [x], [y], [*weights], value_info=values)
        opsets = [helper.make_opsetid(domain, number) for domain, number in (("", 23), ("trt", 1))]
        files = []
        if large is not None:
            (tmp_path / "onnx").mkdir()
            (tmp_path / "onnx" / "weights.bin").write_bytes(large.raw_data)
            length = len(large.raw_data)
            onnx.external_data_helper.set_external_data(large, "weights.bin", 0, length)
            large.ClearField("raw_data")
            made.initializer.append(large)
            files = ["weights.bin"]
        model = helper.make_model(made, opset_imports=opsets, ir_version=11)
        x_spec, y_spec = (
            TensorSpec(name, "float32", ("R", size)) for name, size in zip("xy", sizes, strict=True)
        )
        return as_bundle(tmp_path, model, *files, inputs=(x_spec,), outputs=(y_spec,))

    return make


def cast(value: str, output: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [value], [output], to=to)


def test_a_bundle_for_another_machine_opens_by_name_alone(gpu_bundle: Bundle) -> None:
    inputs = arrays()
    with pytest.raises(EngineError, match=r"look at its .* all the same: --runtime emulate\.$"):
        open_engine(gpu_bundle, "tiny")
    with open_engine(gpu_bundle, "tiny", "emulate") as engine:
        assert (engine.run(inputs)["y"] == expected(**inputs)).all()
    assert "emulate" not in {runtime.name for runtime in runtimes()}


@pytest.mark.parametrize(("precision", "told"), [("fp32", False), ("bf16", True), ("fp8", True)])
def test_what_is_opened_says_whether_it_is_an_emulation(
    gpu_bundle: Bundle, precision: str, told: bool
) -> None:
    tiny = gpu_bundle.manifest.components["tiny"]
    gpu = replace(tiny, precision=precision)
    here = replace(gpu, engines=(replace(engine_record(), path="onnx/tiny.onnx"), *tiny.engines))
    components: Any = gpu_bundle.manifest.components
    for components["tiny"], runtime, emulated in (
        (gpu, "emulate", told),
        (here, "emulate", told),
        # Only FP8 is emulated by what ONNX Runtime's own engine is on a CPU.
        (here, "auto", precision == "fp8"),
    ):
        with open_engine(gpu_bundle, "tiny", runtime) as engine:
            assert engine.emulated == emulated, runtime


def test_a_graph_takes_sizes_that_its_engines_do_not(gpu_bundle: Bundle) -> None:
    """But no larger batches, which a host divides."""
    inputs = arrays(tokens=RANGES["T"].max + 1)
    tiny = gpu_bundle.manifest.components["tiny"]
    one = replace(tiny.engines[0], dimensions={**RANGES, "B": DimensionRange(1, 1, 1)})
    components: Any = gpu_bundle.manifest.components
    components["tiny"] = replace(tiny, engines=(one, *tiny.engines))
    with open_engine(gpu_bundle, "tiny", "emulate") as engine:
        assert (engine.run(inputs)["y"] == expected(**inputs)).all()
        assert engine.dimensions == {"B": RANGES["B"]}


def test_a_bundle_without_the_graph_is_refused(gpu_bundle: Bundle) -> None:
    components: Any = gpu_bundle.manifest.components
    components["tiny"] = replace(components["tiny"], files=())
    with pytest.raises(EngineError, match="--runtime emulate: it has engines for tensorrt-rtx on"):
        open_engine(gpu_bundle, "tiny", "emulate")
    with pytest.raises(EngineError) as caught:
        open_engine(gpu_bundle, "tiny")
    assert "emulate" not in str(caught.value)


def test_a_package_that_is_missing_is_named(
    gpu_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = gpu_bundle.manifest.components["tiny"]
    (engine,) = Emulate().engines("tiny", tiny).values()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "engines.emulate.graph", None)
        with pytest.raises(MissingDependencyError) as missing:
            Emulate().open("tiny", tiny, engine, gpu_bundle.root, EngineOptions())
    assert f"the package onnx: {install_command('export')}" in str(missing.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else "it")
    with pytest.raises(EngineError) as caught:
        open_engine(gpu_bundle, "tiny", "emulate")
    assert f"onnx is not installed: {install_command('export')}" in str(caught.value)


@pytest.mark.parametrize("choose", [choose_runtime, choose_builder])
@pytest.mark.parametrize("targets", [(), ("cpu",)])
def test_nothing_is_built_for_it(choose: Callable[..., Any], targets: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="No bundle is built for --runtime emulate, which runs"):
        choose("emulate", targets)


@pytest.mark.parametrize("name", NUMBERS)
def test_sixteen_bits_are_rounded_as_they_are_computed(graph: MakeGraph, name: str) -> None:
    """Products and sums once each, over weights that stay as they are stored, beside the graph."""
    kind, dtype = TYPES[name], NUMBERS[name]
    random = np.random.RandomState(0)
    weight = random.standard_normal((48, 5)).astype(dtype)
    bias = random.standard_normal(5).astype(dtype)
    nodes = [
        cast("x", "x16", kind),
        helper.make_node("MatMul", ["x16", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Mul", ["sum", "bias"], ["scaled"]),
        cast("scaled", "y", TensorProto.FLOAT),
    ]
    made = graph(
        nodes,
        dict.fromkeys(("x16", "product", "sum", "scaled"), kind),
        (48, 5),
        numpy_helper.from_array(bias, "bias"),
        large=numpy_helper.from_array(weight, "weight"),
    )
    components: Any = made.manifest.components
    components["tiny"] = replace(components["tiny"], precision=name)
    with open_engine(made, "tiny", "emulate") as engine:
        for rows in (1, 7):
            x = random.standard_normal((rows, 48)).astype(np.float32)
            found = engine.run({"x": x})["y"]
            product = x.astype(dtype).astype(np.float64) @ weight.astype(np.float64)
            total = product.astype(dtype) + bias
            exact = (total * bias).astype(np.float32)
            assert (found == exact).all()
            assert (found != (x @ weight.astype(np.float32) + bias) * bias).any()


def test_e2m1_in_blocks_is_rounded_to_the_nearest_and_even(graph: MakeGraph) -> None:
    """Of every quarter from -6 to 6, so that all middles are among them."""
    numbers = np.arange(-24, 25, dtype=np.float32) / 4
    x = np.full((49, 16), 6, np.float32)
    x[:, 1] = numbers
    block = {"axis": -1, "block_size": 16}
    e4m3, e2m1 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize",
            ["x", "one"],
            ["q", "s"],
            domain="trt",
            scale_type=e4m3,
            **block,
        ),
        helper.make_node("DequantizeLinear", ["s", "one"], ["steps"]),
        helper.make_node("DequantizeLinear", ["q", "steps"], ["y"], **block),
    ]
    one = numpy_helper.from_array(np.float32(1), "one")
    made = graph(nodes, {"q": e2m1, "s": e4m3, "steps": TensorProto.FLOAT}, (16, 16), one)
    with open_engine(made, "tiny", "emulate") as engine:
        found = engine.run({"x": x})["y"]
    assert (found[:, 1] == numbers.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)).all()
    assert (found[:, 0] == 6).all()


def test_every_code_of_e2m1_has_its_number(graph: MakeGraph) -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(16, 1).repeat(2, 1)
    numbers = codes.view(ml_dtypes.float4_e2m1fn)
    weight = numpy_helper.from_array(numbers, "weight")
    steps = numpy_helper.from_array(np.array([[1, 0.5]], np.float32), "steps")
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "steps"], ["w"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    made = graph(nodes, {"w": TensorProto.FLOAT}, (16, 2), steps, large=weight)
    with open_engine(made, "tiny", "emulate") as engine:
        found = engine.run({"x": np.eye(16, dtype=np.float32)})["y"]
    assert (found == numbers.astype(np.float32) * [1, 0.5]).all()


def test_a_weight_is_widened_just_before_it_is_used(graph: MakeGraph) -> None:
    """In the order of the graph, which the session keeps: else all of them are wide at once."""
    kind = TensorProto.BFLOAT16
    eye = np.eye(4, dtype=ml_dtypes.bfloat16)
    weights = [numpy_helper.from_array(eye, f"w{n}") for n in range(3)]
    nodes = [cast("x", "x0", kind)]
    nodes += [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(3)]
    nodes.append(cast("x3", "y", TensorProto.FLOAT))
    made = graph(nodes, {f"x{n}": kind for n in range(4)}, (4, 4), *weights)
    data = emulate((made.root / "onnx" / "tiny.onnx").read_bytes())
    order = [node.output[0] for node in onnx.load_model_from_string(data).graph.node]
    for n in range(3):
        assert order.index(f"w{n}") == order.index(f"emulated/x{n + 1}/wide") - 1
    engine: Any = open_engine(made, "tiny", "emulate")
    settings = engine.session.get_session_options()
    assert settings.execution_order == onnxruntime.ExecutionOrder.PRIORITY_BASED
    assert settings.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert not settings.enable_mem_reuse
    assert not settings.enable_cpu_mem_arena


def test_of_a_table_only_the_rows_that_are_read_are_widened(graph: MakeGraph) -> None:
    table = np.random.RandomState(0).standard_normal((9, 4)).astype(ml_dtypes.bfloat16)
    kind = TensorProto.BFLOAT16
    nodes = [
        cast("x", "rows", TensorProto.INT64),
        helper.make_node("Gather", ["table", "rows"], ["read"]),
        helper.make_node("Squeeze", ["read"], ["flat"]),
        helper.make_node("Add", ["flat", "flat"], ["twice"]),
        cast("twice", "y", TensorProto.FLOAT),
    ]
    types = {"rows": TensorProto.INT64, **dict.fromkeys(("read", "flat", "twice"), kind)}
    made = graph(nodes, types, (1, 4), large=numpy_helper.from_array(table, "table"))
    rows = np.array([3, 0, 8, 3])
    with open_engine(made, "tiny", "emulate") as engine:
        found = engine.run({"x": rows.astype(np.float32)[:, None]})["y"]
    assert (found == (table[rows] + table[rows]).astype(np.float32)).all()
    model = onnx.load_model_from_string(emulate((made.root / "onnx/tiny.onnx").read_bytes()))
    (stored,) = model.graph.initializer
    assert [user.op_type for user in model.graph.node if stored.name in user.input] == ["Gather"]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("Mystery", ["x"], ["y"], domain="acme"), "the operator acme.Mystery is"),
        (helper.make_node("Abs", ["x"], ["z"]), "it does not say of which type z is"),
        (helper.make_node("Loop", ["x"], ["y"], body=onnx.GraphProto()), "control flow, which are"),
    ],
)
def test_what_cannot_be_emulated_is_named(
    graph: MakeGraph, node: onnx.NodeProto, words: str
) -> None:
    made = graph([node], {}, (4, 4))
    with pytest.raises(EngineError, match=f"tiny .*tiny.onnx. cannot be emulated: .*{words}"):
        open_engine(made, "tiny", "emulate")


def test_weights_that_the_manifest_does_not_list_are_not_read(graph: MakeGraph) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    made = graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], {}, (4, 4), large=weight)
    components: Any = made.manifest.components
    components["tiny"] = replace(components["tiny"], files=components["tiny"].files[:1])
    with pytest.raises(BundleError, match=r"'weights.bin', which is not among"):
        open_engine(made, "tiny", "emulate")


def test_pictures_are_drawn_with_it(demo_bundle: Path) -> None:
    """Of a bundle in float32, so that they are the usual ones."""
    drawn = []
    for runtime in ("onnxruntime", "emulate"):
        with FluxPipeline.from_bundle(demo_bundle, runtime=runtime) as pipe:
            asked = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
            drawn.append(pipe("a red circle above a blue square", **asked).images[0])
    assert np.abs(drawn[0] - drawn[1]).max() < 1 / 255
    assert drawn[0].std() > 0.05
