"""What a component's weights come to, and whether there is room for them on the disk.

From headers alone: no weight is read, and nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy.build.staging import Staging
from fluxdeploy.precision import PRECISIONS

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint, StoredTensor
    from exporters.components.chain import Chain

__all__ = [
    "WIDTHS",
    "Footprint",
    "can_link",
    "count_elements",
    "existing_folder",
    "staged_bytes",
    "weigh",
]

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element of the types that components compute in."""


@dataclass(frozen=True)
class Footprint:
    """A component's weights, in bytes where nothing else is said.

    parameters: how many numbers they are.
    linked, written: those that stay as they are in the checkpoint's files, and those that are
        converted or quantized into new ones.
    graph: all of them in the types that the graph computes with, as an engine holds them.
    packed: the part of `graph` that is quantized, and `quantized` how many numbers those are.
    largest_packed: the numbers of the largest tensor that is quantized.
    largest_stage: the weights of the largest stage in float32, as PyTorch runs it, with the largest
        tensor once more, as it is read.
    sources: the checkpoint's files that the linked ones lie in.
    """

    chain: Chain
    parameters: int
    linked: int
    written: int
    graph: int
    packed: int
    quantized: int
    largest_packed: int
    largest_stage: int
    sources: frozenset[Path]


def weigh(checkpoint: Checkpoint, name: str, precision: str, compute: str) -> Footprint:
    """Add up the weights of a component. The rules are those of `exporters.weights.bind`.

    Raises `CheckpointError` for a missing tensor and for a wrong shape or type.
    """
    from exporters.checkpoint.tensors import find_tensor
    from exporters.components.policy import is_quantized
    from exporters.export import component_source
    from exporters.formats import FORMATS

    quantization, width = PRECISIONS[precision].quantization, WIDTHS[compute]
    chain, weights = component_source(checkpoint, name, compute)
    shapes = {
        stage.scope + parameter: tuple(value.shape)
        for stage in chain.stages
        for parameter, value in stage.piece.module.named_parameters()
    }
    linked = written = graph = packed = quantized = largest_packed = 0
    sources = set()
    for tensor, shape in shapes.items():
        stored, count = find_tensor(weights, tensor, shape), count_elements(shape)
        linear = tensor.removesuffix(".weight")
        if quantization is not None and linear != tensor and is_quantized(name, linear):
            packed += FORMATS[quantization.format].nbytes(shape, width)
            quantized += count
            largest_packed = max(largest_packed, count)
            continue
        graph += width * count
        if not _is_kept(stored, compute):
            written += width * count
        elif quantization is not None:
            written += stored.nbytes
        else:
            linked += stored.nbytes
            sources.add(Path(os.path.realpath(stored.file)))
    return Footprint(
        chain=chain,
        parameters=sum(map(count_elements, shapes.values())),
        linked=linked,
        written=written + packed,
        graph=graph + packed,
        packed=packed,
        quantized=quantized,
        largest_packed=largest_packed,
        largest_stage=_largest_stage(chain),
        sources=frozenset(sources),
    )


def _is_kept(stored: StoredTensor, compute: str) -> bool:
    """Whether a weight's bytes stay as they are: the graph's own type, or one that it widens."""
    same = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[compute]
    kinds = ("F32", "F16", "BF16") if compute == "fp32" else (same,)
    return stored.scale is None and stored.dtype in kinds


def _largest_stage(chain: Chain) -> int:
    largest = 0
    for piece in chain.pieces:
        counts = [parameter.numel() for parameter in piece.module.parameters()]
        largest = max(largest, 4 * sum(counts) + 4 * max(counts, default=0))
    return largest


def count_elements(shape: Iterable[int]) -> int:
    """How many numbers a tensor of this shape holds."""
    return math.prod(shape)


def existing_folder(path: Path) -> Path:
    """The folder that holds `path`, or the nearest one of those that it will lie in."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def can_link(file: Path, folder: Path) -> bool:
    """Whether a hard link from below `folder` to `file` is probably possible."""
    status = file.stat()
    # Linux lets others than the owner link a file only where they could write to it.
    allowed = os.name == "nt" or status.st_uid == os.geteuid() or os.access(file, os.W_OK)
    return allowed and status.st_dev == folder.stat().st_dev


def staged_bytes(destination: Path) -> int:
    """Bytes that an unfinished build of a bundle holds: the next one takes them over or away."""
    total = 0
    for folder, _, files in os.walk(Staging(destination).root):
        for file in files:
            status = os.lstat(os.path.join(folder, file))
            if status.st_nlink == 1:  # others lie in the checkpoint or in an earlier bundle too
                total += status.st_size
    return total
