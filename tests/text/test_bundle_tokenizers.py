"""The tokenizers of a bundle come from its manifest, and need neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporters.tokenizers import canonical_tokenizer
from fluxdeploy import text
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.errors import BundleError
from fluxdeploy.text import load_tokenizers


def bundle(root: Path, tokenizers: Mapping[str, TokenizerRecord]) -> Any:
    manifest: Any = SimpleNamespace(tokenizers=tokenizers)
    return Bundle(root, manifest, "")


@pytest.fixture
def records(demo: Mapping[str, Path], tmp_path: Path) -> dict[str, TokenizerRecord]:
    """Those of a bundle in `tmp_path`, whose T5 takes 256 tokens."""
    made = {
        "clip": canonical_tokenizer(demo["model"] / "tokenizer", "clip"),
        "t5": canonical_tokenizer(demo["model"] / "tokenizer_2", "t5", 256),
    }
    (tmp_path / "tokenizers").mkdir()
    for name, tokenizer in made.items():
        (tmp_path / f"tokenizers/{name}.json").write_text(tokenizer.text, encoding="utf-8")
    return {
        name: TokenizerRecord(
            path=f"tokenizers/{name}.json",
            files=(),
            **{key: value for key, value in asdict(tokenizer).items() if key != "text"},
        )
        for name, tokenizer in made.items()
    }


def test_lengths_and_files_come_from_the_manifest(
    records: dict[str, TokenizerRecord], tmp_path: Path
) -> None:
    tokenizers = load_tokenizers(bundle(tmp_path, records))
    assert tokenizers.clip(["a cat", ""]).shape == (2, 77)
    assert tokenizers.t5(["a cat"], 128).shape == (1, 128)
    assert tokenizers.t5(["a cat"]).shape == (1, 256)


def test_ids_and_sides_come_from_the_manifest(
    records: dict[str, TokenizerRecord], tmp_path: Path
) -> None:
    changed = replace(
        records["t5"],
        pad_id=5,
        prefix=(7, 8),
        suffix=(9,),
        padding_side="left",
        truncation_side="left",
    )
    t5 = load_tokenizers(bundle(tmp_path, records | {"t5": changed})).t5
    own = load_tokenizers(bundle(tmp_path, records)).t5(["a cat and a dog"], 64)[0].tolist()
    own = own[: own.index(1)]
    assert t5(["a cat and a dog"], 32)[0].tolist() == [5] * (29 - len(own)) + [7, 8, *own, 9]
    assert t5(["a cat and a dog"], 6)[0].tolist() == [7, 8, *own[-3:], 9]


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_manifest_without_tokenizers_is_refused(
    records: dict[str, TokenizerRecord], tmp_path: Path, name: str
) -> None:
    del records[name]
    with pytest.raises(BundleError, match=f"no tokenizer {name}; build it again"):
        load_tokenizers(bundle(tmp_path, records))


@pytest.mark.parametrize("data", [b"{}", b"\xff", None])
def test_a_file_that_is_no_tokenizer_is_refused(
    records: dict[str, TokenizerRecord], tmp_path: Path, data: bytes | None
) -> None:
    path = tmp_path / "tokenizers/t5.json"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError, match=r"tokenizers/t5\.json cannot be read: .* Build"):
        load_tokenizers(bundle(tmp_path, records))


def test_public_names_exist() -> None:
    assert sorted(text.__all__) == text.__all__
    assert all(hasattr(text, name) for name in text.__all__)


def test_tokens_without_torch_transformers_and_protobuf(
    records: dict[str, TokenizerRecord], tmp_path: Path
) -> None:
    program = f"""
import sys
blocked = ("torch", "transformers", "google.protobuf", "sentencepiece", "safetensors", "onnx")
for name in blocked:
    sys.modules[name] = None
from pathlib import Path
from types import SimpleNamespace
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.text import load_tokenizers
manifest = SimpleNamespace(tokenizers={records!r})
tokenizers = load_tokenizers(Bundle(Path({str(tmp_path)!r}), manifest, ""))
tokenizers.clip(["a cat"]), tokenizers.t5(["a cat"])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
