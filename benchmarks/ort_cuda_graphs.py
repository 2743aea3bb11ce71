"""Graphs of FLUX.1-dev's transformer in bfloat16 for ONNX Runtime's CUDA provider, without weights.

    python benchmarks/ort_cuda_graphs.py FOLDER --double-blocks 5 --single-blocks 10

For `ort_cuda_step.py`. `narrow` is a bundle's graph, with bfloat16 around norms, RoPE, modulation
and gates; `casts` is the same with float32 there. Weights are declared as the products read them,
which ONNX Runtime makes of a bundle's when it opens it, so that opening takes no time of the GPU's.
Prints what each graph moves besides products and attention.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
from ort_cuda_files import GRAPHS, LAYOUT, WEIGHTS

from exporters.checkpoint import open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import specify
from exporters.graph.fuse import fuse_attention
from exporters.graph.narrow import keep_16_bits
from exporters.graph.trace import trace_chain
from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_sparse_checkpoint

__all__ = ["moved_bytes", "write_graphs"]


_CHANGES: Mapping[str, Callable[[ir.Model], None]] = {
    "casts": lambda model: None,
    "narrow": keep_16_bits,
}
assert tuple(_CHANGES) == GRAPHS


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--double-blocks", default=5, show_default=True)
@click.option("--single-blocks", default=10, show_default=True)
def main(folder: Path, double_blocks: int, single_blocks: int) -> None:
    """Write FOLDER/NAME.onnx of each graph, and layout.json, which says what their weights are."""
    write_graphs(folder, double_blocks, single_blocks)
    for size in (1024, 512):
        for name in GRAPHS:
            moved = moved_bytes(folder / f"{name}.onnx", 512, (size // 16) ** 2)
            total = sum(moved.values())
            most = ", ".join(f"{op} {n / 1e9:.2f}" for op, n in moved.most_common(8))
            click.echo(f"{size} {name}: {total / 1e9:.2f} GB a step: {most}")


def write_graphs(folder: Path, double_blocks: int, single_blocks: int) -> None:
    """Write the graphs. All point into one file of weights, which has to be written still."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary)
        write_sparse_checkpoint(checkpoint, flux_of_depth(double_blocks, single_blocks))
        spec = specify(open_checkpoint(checkpoint), COMPONENTS["transformer"], "bf16")
    traced = trace_chain(spec.chain)
    boundary = len(spec.chain.inputs)
    fuse_attention(traced)
    layout: dict[str, dict[str, object]] = {}
    end = 0
    for name, change in _CHANGES.items():
        model = traced.clone()
        change(model)
        for value in list(model.graph.inputs[boundary:]):
            model.graph.inputs.remove(value)
        for value, source, turned in _weights(model, {p.name for p in spec.placements}):
            shape = value.shape
            assert value.dtype is not None
            assert shape is not None
            nbytes = 2 * int(_product(shape.numpy()))
            if value.name not in layout:
                entry = {"offset": end, "nbytes": nbytes, "source": source, "turned": turned}
                layout[str(value.name)] = entry
                end += -(-nbytes // 4096) * 4096
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                int(str(layout[str(value.name)]["offset"])),
                nbytes,
                value.dtype,
                shape=shape,
                name=str(value.name),
            )
            model.graph.register_initializer(value)
        proto = ir.to_proto(model)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    (folder / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _weights(model: ir.Model, names: set[str]) -> list[tuple[ir.Value, str, bool]]:
    """Parameters as nodes read them, of which checkpoint's tensor they are, and whether turned."""
    found: dict[ir.Value, tuple[str, bool]] = {}
    for node in list(model.graph):
        for value in node.inputs:
            if value is not None and value.name in names and value.producer() is None:
                found.setdefault(value, (value.name, False))
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight not in found or weight.shape is None:
            continue
        whole, shape = node.outputs[0], ir.Shape(weight.shape.numpy()[::-1])
        made = ir.Value(name=f"{weight.name}.turned", shape=shape, type=whole.type)
        for user, index in list(whole.uses()):
            user.replace_input_with(index, made)
        model.graph.remove(node, safe=True)
        found[made] = (str(weight.name), True)
    return [(value, *how) for value, how in found.items() if list(value.uses())]


def moved_bytes(path: Path, text: int, image: int) -> Counter[str]:
    """Bytes that a graph's operators read and write, without products, attention and reshapes."""
    sizes = {"B": 1, "S": text, "L": image, "T": text + image}
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = sizes[axis.dim_param]
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
    kept = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    contributed = {}
    for node in model.graph.node:
        if node.op_type == "Shape":
            # The number of the text's tokens, without which no size of a slice is known.
            tensor = onnx.numpy_helper.from_array(np.array([text]), node.output[0])
            node.op_type = "Constant"
            del node.input[:]
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", tensor))
        if node.domain:
            # Both give what their first input has in shape and type.
            contributed[node.output[0]] = (node.op_type, list(node.input))
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
            del node.attribute[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    nbytes = {
        v.name: _product(tuple(d.dim_value for d in v.type.tensor_type.shape.dim))
        * {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.BFLOAT16: 2}.get(
            v.type.tensor_type.elem_type, 8
        )
        for v in values
    }
    moved: Counter[str] = Counter()
    for node in model.graph.node:
        op_type, inputs = contributed.get(node.output[0], (node.op_type, list(node.input)))
        if op_type in ("MatMul", "MultiHeadAttention", "Reshape", "Constant", "Identity"):
            continue
        moved[op_type] += sum(nbytes[name] for name in node.output)
        if op_type == "Slice":
            moved[op_type] += sum(nbytes[name] for name in node.output)
        else:
            moved[op_type] += sum(nbytes.get(name, 0) for name in inputs)
    return moved


if __name__ == "__main__":
    main()
