"""The content key of a component: equal keys, equal files. A build reuses what has the same key."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdeploy.build.checkpoint import CheckpointHashes
from fluxdeploy.build.resolve import BuildSpec, ComponentSpec
from fluxdeploy.bundle.typed_json import to_plain

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from exporters.checkpoint.tensors import StoredTensor
    from exporters.quality.layers import Layers

__all__ = ["content_key", "digest", "sources_digest", "tool_versions"]

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")

_SOURCES = (
    "engines/**/*.py",
    "exporters/**/*.py",
    "fluxdeploy/*.py",
    "fluxdeploy/build/**/*.py",
    "fluxdeploy/bundle/**/*.py",
    "fluxdeploy/lora/**/*.py",
    "fluxdeploy/sampling/**/*.py",
)
_NOT_SOURCES = "exporters/training"
"""Of those, what no bundle is made by."""


def content_key(
    component: ComponentSpec, spec: BuildSpec, hashes: CheckpointHashes, layers: Layers | None
) -> str:
    """Of all that a component's files depend on. `layers` are those of a quantized one."""
    checkpoint, request = spec.checkpoint, spec.request
    files = {placement.stored.file for placement in component.export.placements}
    return digest(
        {
            "component": component.name,
            "stem": component.stem,
            "precision": component.precision,
            "compute": component.compute,
            "kernels": component.kernels.value,
            "layers": None if layers is None else _described(layers),
            "upstream": _upstream(component, checkpoint, hashes),
            "networks": repr(
                (
                    *(checkpoint.transformer, checkpoint.vae, *checkpoint.controlnets),
                    checkpoint.ip_adapter,
                    checkpoint.redux,
                )
            ),
            "configs": {name: dict(part.config) for name, part in checkpoint.parts.items()},
            # The names are those of the files in the bundle.
            "weights": sorted(
                (file.name, hashes.files[Path(os.path.realpath(file))]) for file in files
            ),
            "loras": _merged(placement.stored for placement in component.export.placements),
            "constants": repr((checkpoint.latents, checkpoint.rope, checkpoint.schedule)),
            "engines": [asdict(engine) for engine in component.engines],
            "profiles": repr(component.profiles),
            "settings": [request.memory_limit, request.weight_streaming],
            # What a strict build refuses, another one has made.
            "strict": request.strict and component.runtime.builds,
            "builder": component.runtime.builder(),
            "tools": tool_versions(),
            "sources": sources_digest(),
        }
    )


def _upstream(
    component: ComponentSpec, checkpoint: Checkpoint, hashes: CheckpointHashes
) -> list[str]:
    """The weights of the parts that golden inputs are made of: text encoders, and what joins."""
    texts = ("clip", "t5")
    adapter = () if checkpoint.ip_adapter is None else ("ip_adapter_encoder", "ip_adapter")
    before = {
        "transformer": (*texts, *checkpoint.controlnet_parts, *adapter),
        "ip_adapter": adapter[:1],
        **dict.fromkeys(checkpoint.controlnet_parts, texts),
    }
    part = component.export.component.part
    tensors = [s for name in before.get(part, ()) for s in checkpoint.part(name).weights.values()]
    files = {stored.file for stored in tensors}
    return [
        *sorted(hashes.files[Path(os.path.realpath(file))] for file in files),
        *_merged(tensors),
    ]


def _merged(tensors: Iterable[StoredTensor]) -> list[str]:
    """The LoRAs that change any of the tensors, in the order in which they are added."""
    changes = (change for stored in tensors for change in stored.changes)
    # The scale may come from a file beside it.
    return list(dict.fromkeys(f"{c.sha256}:{c.strength}:{c.difference.scale}" for c in changes))


def _described(layers: Layers) -> Any:
    ranges = layers.ranges
    needed = ranges is not None and (
        layers.quantization.activations == "static" or layers.smoothing
    )
    known = [
        {n: hashlib.sha256(array.tobytes()).hexdigest() for n, array in arrays.items()}
        for arrays in (layers.means, layers.moments)
    ]
    return [to_plain(layers.recipe), to_plain(ranges) if needed else None, *known]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def tool_versions() -> dict[str, str]:
    """The packages that decide what an export looks like."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


@cache
def sources_digest() -> str:
    """SHA-256 of our own sources that make a bundle: other code makes other files."""
    found = hashlib.sha256()
    for path in _sources():
        found.update(path.read_bytes())
    return found.hexdigest()


def _sources() -> Iterator[Path]:
    root = Path(__file__).parents[2]
    for pattern in _SOURCES:
        for path in sorted(root.glob(pattern)):
            if not path.is_relative_to(root / _NOT_SOURCES):
                yield path
