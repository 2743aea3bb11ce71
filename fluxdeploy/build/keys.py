"""What a build's pieces are keyed by, and the weight files that are pieces of their own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from fluxdeploy.build.staging import Staging
from fluxdeploy.bundle.manifest import FileRecord

__all__ = ["WeightPieces", "digest", "exporters_digest", "tool_versions", "weight_bytes"]

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


class WeightPieces:
    """The converted weight files of one component, each a piece of the staging folder."""

    def __init__(self, staging: Staging, key: str) -> None:
        self.hashes: dict[str, str] = {}
        self._staging, self._key = staging, key

    def finished(self, file: str) -> bool:
        return self._remember(self._staging.finished(f"weights.{file}", self._key) or ())

    def record(self, file: str, sha256: str) -> None:
        path = f"onnx/weights/{file}"
        known = {path: sha256}
        self._remember(self._staging.record(f"weights.{file}", self._key, [path], known))

    def _remember(self, files: tuple[FileRecord, ...]) -> bool:
        self.hashes |= {record.path: record.sha256 for record in files}
        return bool(files)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """The packages that decide what an export looks like."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def exporters_digest() -> str:
    """SHA-256 of the exporters' own sources: another exporter makes other pieces.

    The training of the demo checkpoints is no part of an export.
    """
    import exporters

    root = Path(next(iter(exporters.__path__)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.is_relative_to(root / "training"):
            continue
        digest.update(path.read_bytes())
    return digest.hexdigest()


def weight_bytes(folder: Path, name: str) -> int:
    """Bytes of a component's weights in float32."""
    import onnx

    graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
    total = 0
    for tensor in graph.initializer:
        count = 4
        for size in tensor.dims:
            count *= size
        total += count
    return total
