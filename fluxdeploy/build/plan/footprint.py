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
    from exporters.components.chain import Chain
    from exporters.export import ExportSpec

__all__ = [
    "WIDTHS",
    "Footprint",
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
    quantized: how many numbers of them are quantized, and `largest_quantized` those of the largest
        tensor that is.
    largest_stage: the weights of the largest stage in float32, as PyTorch runs it, with the largest
        tensor once more, as it is read.
    sources: the checkpoint's files that the linked ones lie in.
    """

    parameters: int
    linked: int
    written: int
    graph: int
    quantized: int
    largest_quantized: int
    largest_stage: int
    sources: frozenset[Path]


def weigh(spec: ExportSpec) -> Footprint:
    """Add up the weights of a component, by what is to become of each."""
    from exporters.formats import FORMATS
    from exporters.weights.decide import Storing

    quantization, width = PRECISIONS[spec.precision].quantization, WIDTHS[spec.compute]
    parameters = linked = written = graph = quantized = largest = 0
    for placement in spec.placements:
        stored, count = placement.stored, count_elements(placement.stored.shape)
        parameters += count
        if placement.how is Storing.QUANTIZED:
            assert quantization is not None
            size = FORMATS[quantization.format].nbytes(stored.shape, width)
            graph += size
            written += size
            quantized += count
            largest = max(largest, count)
            continue
        graph += width * count
        if placement.how is Storing.LINKED:
            linked += stored.nbytes
        else:
            written += stored.nbytes if placement.how is Storing.COPIED else width * count
    return Footprint(
        parameters=parameters,
        linked=linked,
        written=written,
        graph=graph,
        quantized=quantized,
        largest_quantized=largest,
        largest_stage=_largest_stage(spec.chain),
        sources=spec.linked,
    )


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


def staged_bytes(destination: Path) -> int:
    """Bytes that an unfinished build of a bundle holds: the next one takes them over or away."""
    total = 0
    for folder, _, files in os.walk(Staging(destination).root):
        for file in files:
            status = os.lstat(os.path.join(folder, file))
            if status.st_nlink == 1:  # others lie in the checkpoint or in an earlier bundle too
                total += status.st_size
    return total
