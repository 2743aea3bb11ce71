"""A bundle that needs no build: whole enough to be opened and shown, not to be run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fluxdeploy.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ComponentRecord,
    Defaults,
    DimensionRange,
    EngineRecord,
    FileRecord,
    LatentSpec,
    Manifest,
    QualityRecord,
    RopeSpec,
    ScheduleSpec,
    TensorSpec,
    TokenizerRecord,
)
from fluxdeploy.bundle.manifest_json import to_json


def write(root: Path, path: str, data: bytes) -> FileRecord:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return FileRecord(path, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "my [red] bundle"
    decoder = write(root, "onnx/vae_decoder.onnx", b"decoder" * 300)
    tokenizer = write(root, "tokenizers/clip.json", b"{}")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux",
        variant="dev",
        guidance_embedding=True,
        components={
            "vae_decoder": ComponentRecord(
                precision="bf16",
                compute="bf16",
                inputs=(TensorSpec("latents", "float32", ("B", 16, "h", "w")),),
                outputs=(TensorSpec("images", "float32", ("B", 3, "H", "W")),),
                files=(decoder,),
                engines=(
                    EngineRecord(
                        runtime="onnxruntime",
                        runtime_version="1.31.1",
                        target="cpu",
                        path=decoder.path,
                        dimensions={
                            "B": DimensionRange(1, 1, 4),
                            "H": DimensionRange(16, 64, 128),
                            "W": DimensionRange(16, 64, 256),
                            "h": DimensionRange(2, 8, 16),
                            "w": DimensionRange(2, 8, 32),
                        },
                    ),
                ),
                golden=None,
                key="0" * 64,
            )
        },
        latents=LatentSpec(16, 2, 8, 0.3611, 0.1159),
        rope=RopeSpec((16, 56, 56), 10000.0),
        schedule=ScheduleSpec(3.0, True, "exponential", 0.5, 1.15, 256, 4096, None),
        tokenizers={
            "clip": TokenizerRecord(
                tokenizer.path, 77, 49407, (49406,), (49407,), "right", "right", (tokenizer,)
            )
        },
        defaults=Defaults(64, 128, 4, 3.5, 256, 0.6),
        quality=QualityRecord(20.0, 0.75, None),
        provenance={"checkpoint": "a [bold]checkpoint[/bold] :smile:", "tools": {"torch": "2.13"}},
    )
    (root / MANIFEST_NAME).write_text(to_json(manifest), encoding="utf-8")
    return root
