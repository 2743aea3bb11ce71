"""Exported graphs are clean, keep the contract of their boundary, and parse where they must."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS, find_component
from fluxdeploy.errors import ExportError, UsageError
from tests.exporters.conftest import Exports
from tests.exporters.numbers import GRAPHS as BY_NAME
from tests.support.checkpoints import SHAPES

GRAPHS = [
    (component, precision)
    for precision in ("fp32", "bf16", "fp16")
    for component in (*COMPONENTS, "one_piece")
    # Its pieces are those of the other two.
    if (component, precision) != ("one_piece", "fp16")
]
SHAPE = SHAPES["dev"]
D, M = SHAPE.heads * SHAPE.head_dim, 12 * SHAPE.double + 3 * SHAPE.single + 2

CONTRACT = {
    "clip": ({"input_ids": ["B", 77]}, {"pooled_embeddings": ["B", SHAPE.pooled_width]}),
    "t5": ({"input_ids": ["B", "S"]}, {"text_embeddings": ["B", "S", SHAPE.text_width]}),
    "conditioner": (
        {
            "text_embeddings": ["B", "S", SHAPE.text_width],
            "pooled_embeddings": ["B", SHAPE.pooled_width],
            "timestep": ["N"],
            "guidance": ["B"],
        },
        {"context": ["B", "S", D], "modulation": ["N", "B", M, D]},
    ),
    "transformer": (
        {
            "hidden_states": ["B", "L", 64],
            "context": ["B", "S", D],
            "modulation": ["B", M, D],
            "rope_cos": ["T", SHAPE.head_dim],
            "rope_sin": ["T", SHAPE.head_dim],
        },
        {"velocity": ["B", "L", 64]},
    ),
    "one_piece": (
        {
            "hidden_states": ["B", "L", 64],
            "encoder_hidden_states": ["B", "S", SHAPE.text_width],
            "pooled_projections": ["B", SHAPE.pooled_width],
            "timestep": ["B"],
            "img_ids": ["L", 3],
            "txt_ids": ["S", 3],
            "guidance": ["B"],
        },
        {"latent": ["B", "L", 64]},
    ),
    "vae_decoder": ({"latents": ["B", 16, "h", "w"]}, {"images": ["B", 3, "H", "W"]}),
    "vae_encoder": (
        {"images": ["B", 3, "H", "W"]},
        {"mean": ["B", 16, "h", "w"], "logvar": ["B", 16, "h", "w"]},
    ),
}
"""Names and symbolic shapes of every component's tensors, as hosts in all languages rely on."""

graphs = pytest.mark.parametrize(("component", "precision"), GRAPHS)


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker follows external data and refuses hard links: it sees weights as inputs."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            bare.graph.initializer.append(tensor)
    return bare


def types_of_values(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(with_weights_as_inputs(model), strict_mode=True)
    graph = inferred.graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in infos}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


@graphs
def test_graph_is_clean(exports: Exports, component: str, precision: str) -> None:
    model = load(exports(component, precision))
    onnx.checker.check_model(with_weights_as_inputs(model), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 22)]
    assert not model.functions
    nodes = model.graph.node
    assert {node.domain for node in nodes} <= {""}
    assert not [node.op_type for node in nodes if "Sequence" in node.op_type]

    read = {name for node in nodes for name in node.input}
    read |= {value.name for value in model.graph.output}
    assert {tensor.name for tensor in model.graph.initializer} <= read, "unused initializers"
    dead = [node.name for node in nodes if not read.intersection(node.output)]
    assert not dead, "nodes whose result nobody reads"

    types = types_of_values(model)
    producers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Cast":
            continue
        target = node.attribute[0].i
        assert types[node.input[0]] != target, f"{node.name} casts to the type it has"
        before = producers.get(node.input[0])
        if before is not None and before.op_type == "Cast":
            there_and_back = types[before.input[0]] == target
            widened = types[node.input[0]] == TensorProto.FLOAT
            assert not (there_and_back and widened), f"{node.name} undoes the cast before it"


@graphs
def test_boundary_is_the_contract(exports: Exports, component: str, precision: str) -> None:
    graph = load(exports(component, precision)).graph
    inputs, outputs = CONTRACT[component]
    for values, expected in ((graph.input, inputs), (graph.output, outputs)):
        found = {}
        for value in values:
            tensor = value.type.tensor_type
            is_ids = value.name == "input_ids"
            assert tensor.elem_type == (TensorProto.INT32 if is_ids else TensorProto.FLOAT)
            found[value.name] = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        assert found == expected
        assert list(found) == list(expected), "the order too"


@graphs
def test_weights_have_the_types_of_the_precision(
    exports: Exports, component: str, precision: str
) -> None:
    """Every weight is external, and none is kept in float32 where 16 bits were asked for."""
    wanted = {
        "fp32": TensorProto.FLOAT,
        "bf16": TensorProto.BFLOAT16,
        "fp16": TensorProto.FLOAT16,
    }[precision]
    for tensor in load(exports(component, precision)).graph.initializer:
        if tensor.name.startswith("constant.") or tensor.name.endswith(".shape"):
            assert tensor.data_location != TensorProto.EXTERNAL
        else:
            assert tensor.data_location == TensorProto.EXTERNAL, tensor.name
            assert tensor.data_type == wanted, tensor.name


@graphs
def test_tensorrt_rtx_parses_it(exports: Exports, component: str, precision: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(exports(component, precision)))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.num_outputs == len(CONTRACT[component][1])


def test_guidance_is_absent_without_its_embedding(checkpoint: object, source: Path) -> None:
    from exporters.checkpoint import open_checkpoint

    schnell = open_checkpoint(checkpoint("schnell"))  # type: ignore[operator]
    for name in ("conditioner", "one_piece"):
        chain, _ = BY_NAME[name].source(schnell, "fp32")
        assert "guidance" not in [spec.name for spec in chain.inputs]


def test_unknown_component_or_compute_type(opened: Checkpoint) -> None:
    with pytest.raises(ExportError, match="'fp12' is not exported; fp32, bf16, fp16"):
        COMPONENTS["clip"].source(opened, "fp12")
    with pytest.raises(UsageError, match=r"'unet'; there are clip, t5"):
        find_component("unet")
