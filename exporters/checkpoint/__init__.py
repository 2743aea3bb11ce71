"""Reading FLUX.1 checkpoints: headers and configs only, weights stay on disk."""

from exporters.checkpoint.checkpoint import Checkpoint, Part
from exporters.checkpoint.layouts import open_checkpoint
from exporters.checkpoint.tensors import StoredTensor, Weights

__all__ = ["Checkpoint", "Part", "StoredTensor", "Weights", "open_checkpoint"]
