"""A transformer block as an ONNX file: attention with two heads of 128, an MLP, a projection.

The pieces are the product's: linears between Q/DQ in the type that the block computes in, E4M3
weights with a scale for each column, Q/DQ on q, k, softmax output and v. In FP4, linears have
blocks of 16 on both sides, and attention is in E4M3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec

__all__ = ["HIDDEN", "INPUTS", "LINEARS", "OUT", "RANGES", "WIDTH", "Block", "write_block"]

WIDTH, HEADS, HIDDEN, OUT = 256, 2, 1024, 64
HEAD = WIDTH // HEADS
INPUTS = (TensorSpec("x", "float32", ("B", "L", WIDTH)),)
RANGES = {"B": DimensionRange(1, 1, 2), "L": DimensionRange(64, 256, 1024)}

LINEARS = ("q", "k", "v", "out", "up", "down")
"""The linears that are quantized, `final` is not. q, k and v read the same input."""

_KINDS = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
_NARROW = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}
_NARROW |= {"fp4": TensorProto.FLOAT8E4M3FN}  # what is not in blocks
_BLOCK = 16


@dataclass(frozen=True)
class Block:
    """How a block is written; the defaults are the FP8 block that is meant to fuse."""

    compute: str = "bf16"
    narrow: str = "fp8"
    linears: tuple[str, ...] = LINEARS
    attention: tuple[str, ...] = ("q", "k", "softmax", "v")
    activations: bool = True
    linear_scales: str | None = None
    attention_scales: str | None = None
    seed: int = 0


def write_block(folder: Path, block: Block | None = None) -> Path:
    """Write the block as `folder/block.onnx` and return its path."""
    path = folder / "block.onnx"
    onnx.save(_Writer(block or Block()).model(), path)
    return path


@dataclass
class _Writer:
    block: Block
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kind = _KINDS[self.block.compute]
        self.random = np.random.RandomState(self.block.seed)

    def model(self) -> Any:
        x = self.node("Cast", ["x"], "input", to=self.kind)
        joined = x if "q" not in self.block.linears else self.scaled(x, "attn_in", "linear")
        heads = {name: self.linear(name, x, joined, WIDTH, WIDTH) for name in "qkv"}
        q, k, v = (self.node("Reshape", [heads[n], "heads"], f"{n}_heads") for n in "qkv")
        q, k = (self.node("Cast", [t], f"{t}_wide", to=TensorProto.FLOAT) for t in (q, k))
        q, k = (self.node("Mul", [t, "gamma"], f"{t}_normed") for t in (q, k))
        q, k = (self.node("Cast", [t], f"{t}_narrow", to=self.kind) for t in (q, k))
        q = self.node("Transpose", [q], "query", perm=[0, 2, 1, 3])
        k = self.node("Transpose", [k], "key", perm=[0, 2, 3, 1])
        v = self.node("Transpose", [v], "value", perm=[0, 2, 1, 3])
        q, k, v = (self.attended(n, t) for n, t in (("q", q), ("k", k), ("v", v)))
        scores = self.node("MatMul", [q, k], "scores")
        scores = self.node("Cast", [scores], "scores_wide", to=TensorProto.FLOAT)
        shares = self.node("Softmax", [scores], "softmax", axis=-1)
        shares = self.node("Cast", [shares], "shares", to=self.kind)
        mixed = self.node("MatMul", [self.attended("softmax", shares), v], "mixed")
        mixed = self.node("Transpose", [mixed], "mixed_rows", perm=[0, 2, 1, 3])
        mixed = self.node("Reshape", [mixed, "rows"], "merged")
        x = self.node("Add", [x, self.quantized("out", mixed, WIDTH, WIDTH)], "residual")
        x = self.quantized("up", x, WIDTH, HIDDEN)
        x = self.node("Gelu", [x], "gelu", approximate="tanh")
        x = self.quantized("down", x, HIDDEN, WIDTH)
        x = self.quantized("final", x, WIDTH, OUT)
        self.node("Cast", [x], "y", to=TensorProto.FLOAT)
        for name, shape in (("heads", [0, 0, HEADS, HEAD]), ("rows", [0, 0, WIDTH])):
            self.weights.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        self.weights.append(numpy_helper.from_array(np.full(HEAD, 0.3, np.float32), "gamma"))
        graph = helper.make_graph(
            self.nodes,
            "block",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "L", WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "L", OUT])],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def attended(self, name: str, x: str) -> str:
        return self.scaled(x, f"{name}_attn", "attention") if name in self.block.attention else x

    def scaled(self, x: str, name: str, place: str) -> str:
        """`x` rounded to 8 bits and back, where activations are quantized at all."""
        if not self.block.activations:
            return x
        if place == "linear" and self.block.narrow == "fp4":
            return self.in_blocks(x, name)
        scales = getattr(self.block, f"{place}_scales") or self.block.compute
        scale = self.tensor(f"{name}_scale", np.array(0.01), _KINDS[scales])
        narrow = _NARROW[self.block.narrow]
        kept = self.node("QuantizeLinear", [x, scale], f"{name}_kept", output_dtype=narrow)
        wide = self.node("DequantizeLinear", [kept, scale], f"{name}_wide")
        return (
            wide
            if _KINDS[scales] == self.kind
            else self.node("Cast", [wide], f"{name}_cast", to=self.kind)
        )

    def in_blocks(self, x: str, name: str) -> str:
        """`x` rounded to FP4 and back."""
        scale = self.tensor(f"{name}_scale", np.array(0.01), TensorProto.FLOAT)
        kept, steps = f"{name}_kept", f"{name}_steps"
        quantizer = helper.make_node(
            "TRT_FP4DynamicQuantize",
            [x, scale],
            [kept, steps],
            name=kept,
            domain="trt",
            axis=-1,
            block_size=_BLOCK,
            scale_type=TensorProto.FLOAT8E4M3FN,
        )
        self.nodes.append(quantizer)
        return self.from_blocks(kept, steps, scale, name, -1)

    def from_blocks(self, kept: str, steps: str, scale: str, name: str, axis: int) -> str:
        steps = self.node("DequantizeLinear", [steps, scale], f"{name}_steps_single")
        steps = self.node("Cast", [steps], f"{name}_steps_wide", to=self.kind)
        blocks = {"axis": axis, "block_size": _BLOCK}
        return self.node("DequantizeLinear", [kept, steps], f"{name}_wide", **blocks)

    def quantized(self, name: str, x: str, fan_in: int, fan_out: int) -> str:
        scaled = self.scaled(x, f"{name}_in", "linear") if name in self.block.linears else x
        return self.linear(name, x, scaled, fan_in, fan_out)

    def linear(self, name: str, x: str, scaled: str, fan_in: int, fan_out: int) -> str:
        weight = self.random.standard_normal((fan_in, fan_out)) / 16
        bias = self.tensor(f"{name}_bias", np.zeros(fan_out), self.kind)
        if name in self.block.linears and self.block.narrow == "fp4":
            x = scaled
            steps = np.abs(weight).reshape(-1, _BLOCK, fan_out).max(1) / 6
            kept = weight / steps.repeat(_BLOCK, 0)
            wide = self.from_blocks(
                self.tensor(f"{name}_weight", kept, TensorProto.FLOAT4E2M1),
                self.tensor(f"{name}_scales", 1024 * steps, TensorProto.FLOAT8E4M3FN),
                self.tensor(f"{name}_scale", np.array(1 / 1024), TensorProto.FLOAT),
                name,
                0,
            )
        elif name in self.block.linears:
            x = scaled
            limit = {"fp8": 448, "int8": 127}[self.block.narrow]
            scales = np.abs(weight).max(0) / limit
            kept = self.tensor(f"{name}_weight", weight / scales, _NARROW[self.block.narrow])
            kind = _KINDS[self.block.linear_scales or self.block.compute]
            scale = self.tensor(f"{name}_scales", scales, kind)
            wide = self.node("DequantizeLinear", [kept, scale], f"{name}_wide", axis=1)
            if kind != self.kind:
                wide = self.node("Cast", [wide], f"{name}_cast", to=self.kind)
        else:
            wide = self.tensor(f"{name}_weight", weight, self.kind)
        product = self.node("MatMul", [x, wide], f"{name}_product")
        return self.node("Add", [product, bias], f"{name}_sum")

    def tensor(self, name: str, array: Any, kind: int) -> str:
        if kind == TensorProto.INT8:
            values = np.clip(np.round(array), -127, 127).astype(np.int8)
        else:
            values = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        if kind == TensorProto.FLOAT4E2M1:
            codes = values.view(np.uint8).reshape(-1, 2)
            values = codes[:, 0] | codes[:, 1] << 4
        self.weights.append(helper.make_tensor(name, kind, array.shape, values.tobytes(), raw=True))
        return name
