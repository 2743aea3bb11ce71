"""Where the weights of a component will lie, decided from headers: before anything is traced.

A weight whose stored bytes are what the graph computes with stays where it is: the graph points
into the checkpoint's file. A wider graph reaches it by a Cast, which is exact. Anything else is
converted. A quantized component takes all of its weights from new files, so that none of it needs
the checkpoint's much larger ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from exporters.checkpoint.tensors import StoredTensor, Weights, find_tensor
from exporters.components.chain import Chain

__all__ = ["Placement", "Storing", "decide"]

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Storing(Enum):
    """What becomes of a weight's bytes."""

    LINKED = "stays in the checkpoint's file"
    COPIED = "stays as it is, in a new file"
    CONVERTED = "changes to the graph's type, in a new file"
    QUANTIZED = "changes to the format's, in a new file"
    CORRECTED = "makes up for what is rounded of its linear's weight, in a new file"


@dataclass(frozen=True)
class Placement:
    """One weight of a component.

    name: the graph's name for it. stored: where the checkpoint has it. how: what becomes of it.
    dtype: the safetensors type that it has in the bundle; where it is quantized, of the linear
        before that.
    """

    name: str
    stored: StoredTensor
    how: Storing
    dtype: str


def decide(
    chain: Chain,
    weights: Weights,
    is_quantized: Callable[[str], bool] | None,
    is_corrected: Callable[[str], bool] = lambda linear: False,
) -> tuple[Placement, ...]:
    """Place every weight of a chain, in the order of its stages.

    `is_quantized` tells the linears whose weights are quantized, None where nothing is;
    `is_corrected` those of them whose biases make up for it. Raises `CheckpointError` for a missing
    tensor and for a wrong shape or type.
    """
    placements = {}
    for stage in chain.stages:
        for local, parameter in stage.piece.module.named_parameters():
            name = stage.scope + local
            stored = find_tensor(weights, name, tuple(parameter.shape))
            wanted = _TYPES[parameter.dtype]
            linear = name.removesuffix(".weight")
            # A type that the graph widens exactly, or its own. A scale has to be multiplied in.
            types = _TYPES.values() if wanted == "F32" else (wanted,)
            kept = stored.as_stored and stored.dtype in types
            if is_quantized is not None and linear != name and is_quantized(linear):
                placement = Placement(name, stored, Storing.QUANTIZED, wanted)
            elif is_corrected(name.removesuffix(".bias")):
                dtype = stored.dtype if kept else wanted
                placement = Placement(name, stored, Storing.CORRECTED, dtype)
            elif not kept:
                placement = Placement(name, stored, Storing.CONVERTED, wanted)
            else:
                how = Storing.LINKED if is_quantized is None else Storing.COPIED
                placement = Placement(name, stored, how, stored.dtype)
            placements[name] = placement
    return tuple(placements.values())
