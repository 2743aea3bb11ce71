"""A small bundle, whole and valid, for tests that break it: as functions and as fixtures."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    ComponentRecord,
    Defaults,
    DimensionRange,
    EngineRecord,
    FileRecord,
    GoldenRecord,
    LatentSpec,
    Manifest,
    QualityRecord,
    RopeSpec,
    ScheduleSpec,
    TensorSpec,
    TokenizerRecord,
)
from fluxdeploy.bundle.manifest_json import to_json


def _record(path: str, data: bytes) -> FileRecord:
    return FileRecord(path, len(data), hashlib.sha256(data).hexdigest())


def small_files() -> dict[str, bytes]:
    """The bundle's files by path."""
    return {
        "onnx/t5.onnx": b"a graph",
        "onnx/weights/t5.safetensors": b"weights" * 9,
        "golden/t5.safetensors": b"golden",
        "tokenizers/clip.json": b"{}",
    }


def small_manifest(files: dict[str, bytes]) -> Manifest:
    """A manifest with one of everything, for `files`."""
    records = {path: _record(path, data) for path, data in files.items()}
    tokenizer = records.pop("tokenizers/clip.json")
    component = ComponentRecord(
        key="t5 from somewhere",
        precision="bf16",
        compute="bf16",
        inputs=(TensorSpec("input_ids", "int32", ("B", "S")),),
        outputs=(TensorSpec("text_embeddings", "float32", ("B", "S", 4096)),),
        files=tuple(records.values()),
        engines=(
            EngineRecord(
                "onnxruntime",
                "1.31.1",
                "cpu",
                "onnx/t5.onnx",
                {"B": DimensionRange(1, 1, 4), "S": DimensionRange(1, 512, 512)},
            ),
        ),
        golden=GoldenRecord("golden/t5.safetensors", 1e-3, 0.9999),
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux",
        variant="dev",
        guidance_embedding=True,
        components={"t5": component},
        latents=LatentSpec(16, 2, 8, 0.3611, 0.1159),
        rope=RopeSpec((16, 56, 56), 10000.0),
        schedule=ScheduleSpec(3.0, True, "exponential", 0.5, 1.15, 256, 4096, None),
        tokenizers={
            "clip": TokenizerRecord(
                tokenizer.path, 77, 49407, (49406,), (49407,), "right", "right", (tokenizer,)
            )
        },
        defaults=Defaults(1024, 1024, 28, 3.5, 512, 0.6),
        quality=QualityRecord(20.0, 0.75, 12.5),
        provenance={"checkpoint": "0" * 64, "tools": {"torch": "2.13.0", "onnx": None}, "é": [1.5]},
    )


def write_small_bundle(root: Path, files: dict[str, bytes], manifest: Manifest) -> Path:
    """Write a bundle, and return its folder."""
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "fluxdeploy.json").write_text(to_json(manifest), "utf-8")
    return root


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    """The bundle's files by path."""
    return small_files()


@pytest.fixture
def manifest(files: dict[str, bytes]) -> Manifest:
    """A manifest with one of everything, for `files`."""
    return small_manifest(files)


@pytest.fixture
def bundle(tmp_path: Path, files: dict[str, bytes], manifest: Manifest) -> Path:
    """The folder of a whole bundle."""
    return write_small_bundle(tmp_path / "bundle", files, manifest)


@pytest.fixture
def add_large_file(bundle: Path, manifest: Manifest) -> Path:
    """A file past the size that is hashed on opening; sparse, so that it costs nothing."""
    path = bundle / "onnx/weights/large.safetensors"
    path.touch()
    size = (64 << 20) + 1
    with open(path, "r+b") as file:
        file.truncate(size)
    t5 = manifest.components["t5"]
    large = FileRecord("onnx/weights/large.safetensors", size, "0" * 64)
    changed = replace(manifest, components={"t5": replace(t5, files=(*t5.files, large))})
    (bundle / "fluxdeploy.json").write_text(to_json(changed), "utf-8")
    return path
