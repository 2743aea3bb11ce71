"""What a call of a component is made of, as far as its memory goes: sizes, and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["AttentionKernels", "CallSizes"]


class AttentionKernels(Enum):
    """What computes a graph's attention, on which the memory that a run takes depends.

    Plain kernels write the scores to memory. ONNX Runtime's own operator, which the graph must
    hold, has them in tiles. TensorRT's builder merges attention into one kernel, but for one with
    a bias. A native engine has cuDNN's.
    """

    PLAIN = "plain"
    ONNX_RUNTIME = "ONNX Runtime's attention"
    TENSORRT = "TensorRT"
    NATIVE = "native"


@dataclass(frozen=True)
class CallSizes:
    """What components run on: pictures in a call, tokens of text and of a picture, timesteps."""

    batch: int
    text: int
    image: int
    steps: int
