"""What a call of a component is made of, as far as its memory goes: sizes, and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["CallSizes", "Kernels"]


class Kernels(Enum):
    """What computes a component, which decides how many of its tensors are alive at once."""

    PLAIN = "plain"
    ONNX_RUNTIME = "ONNX Runtime's attention"
    TENSORRT = "TensorRT"


@dataclass(frozen=True)
class CallSizes:
    """What components run on: pictures in a call, tokens of text and of a picture, timesteps."""

    batch: int
    text: int
    image: int
    steps: int
