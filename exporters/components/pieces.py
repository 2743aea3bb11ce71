"""What chains are put together from: tensors at the boundary, types inside, modules to trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from exporters.components.chain import Piece, Value
from fluxdeploy.bundle.manifest import Dimension, TensorSpec

__all__ = ["COMPUTE_TYPES", "ComputeType", "floats", "make_piece", "token_ids", "value_of"]


@dataclass(frozen=True)
class ComputeType:
    """Types inside a graph: of the linears and convolutions, and of the residual stream."""

    name: str
    dtype: torch.dtype
    residual: torch.dtype


COMPUTE_TYPES: Mapping[str, ComputeType] = {
    "fp32": ComputeType("fp32", torch.float32, torch.float32),
    "bf16": ComputeType("bf16", torch.bfloat16, torch.bfloat16),
    # FLUX.1's residual stream leaves FP16's range.
    "fp16": ComputeType("fp16", torch.float16, torch.float32),
}


def floats(name: str, *shape: Dimension) -> TensorSpec:
    """A float32 tensor at a component's boundary."""
    return TensorSpec(name, "float32", shape)


def token_ids(*shape: Dimension) -> TensorSpec:
    """The input of a text encoder."""
    return TensorSpec("input_ids", "int32", shape)


def value_of(spec: TensorSpec) -> Value:
    """A tensor at the boundary as a value of the chain."""
    return Value(torch.int32 if spec.dtype == "int32" else torch.float32, spec.shape)


def make_piece(build: Callable[[], nn.Module], compute: ComputeType, *inputs: Value) -> Piece:
    """A module that computes in a type, on the meta device."""
    with torch.device("meta"):
        return Piece(build().to(compute.dtype).eval(), inputs)
