"""The tokenizers of a bundle come from its manifest, and need neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
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
from fluxdeploy.bundle.manifest import FileRecord, TokenizerRecord
from fluxdeploy.errors import BundleError
from fluxdeploy.text import load_tokenizers


def bundle(root: Path, tokenizers: Mapping[str, TokenizerRecord]) -> Any:
    manifest: Any = SimpleNamespace(tokenizers=tokenizers)
    return Bundle(root, manifest, "")


def write(root: Path, path: str, data: bytes) -> FileRecord:
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_bytes(data)
    return FileRecord(path, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def records(demo: Mapping[str, Path], tmp_path: Path) -> dict[str, TokenizerRecord]:
    """Those of a bundle in `tmp_path`, whose T5 takes 256 tokens."""
    made = {
        "clip": canonical_tokenizer(demo["model"] / "tokenizer", "clip"),
        "t5": canonical_tokenizer(demo["model"] / "tokenizer_2", "t5", 256),
    }
    return {
        name: TokenizerRecord(
            path=f"tokenizers/{name}.json",
            files=(write(tmp_path, f"tokenizers/{name}.json", tokenizer.text.encode()),),
            **{
                key: value
                for key, value in asdict(tokenizer).items()
                if key not in ("text", "largest_id")
            },
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


@pytest.mark.parametrize("data", [b"{}", b"\xff", b"", b"null", b"[" * 5000])
def test_a_file_that_is_no_tokenizer_is_refused(
    records: dict[str, TokenizerRecord], tmp_path: Path, data: bytes
) -> None:
    file = write(tmp_path, "tokenizers/t5.json", data)
    with pytest.raises(BundleError, match=r"tokenizers/t5\.json cannot be read: .* Build"):
        load_tokenizers(bundle(tmp_path, {**records, "t5": replace(records["t5"], files=(file,))}))


@pytest.mark.parametrize("number", [2**31, -(2**31), 10**12, 1_673_039_458, (1 << 24) + 1])
@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_number_that_would_take_all_memory_is_refused(
    records: dict[str, TokenizerRecord], tmp_path: Path, name: str, number: int
) -> None:
    """As an id, the native library would make room for so many tokens, or end the process."""
    document = json.loads((tmp_path / f"tokenizers/{name}.json").read_text())
    if name == "clip":
        document["model"]["vocab"]["x"] = number
    else:
        document["added_tokens"] = [{"id": number, "content": "x", "special": False}]
    (tmp_path / f"tokenizers/{name}.json").unlink()
    file = write(tmp_path, f"tokenizers/{name}.json", json.dumps(document).encode())
    changed = replace(records[name], files=(file,))
    with pytest.raises(BundleError, match=f"{name}.json cannot be read: it has a number beyond"):
        load_tokenizers(bundle(tmp_path, {**records, name: changed}))


@pytest.mark.parametrize("change", ["bytes", "size", "missing", "folder", "swapped"])
def test_other_bytes_than_the_recorded_ones_are_never_used(
    records: dict[str, TokenizerRecord], tmp_path: Path, change: str
) -> None:
    path = tmp_path / "tokenizers/t5.json"
    text = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change == "swapped":
        path.write_bytes((tmp_path / "tokenizers/clip.json").read_bytes())
    elif change != "missing":
        path.write_bytes(text.replace(b"0", b"1") if change == "bytes" else text + b" ")
    with pytest.raises(BundleError, match=r"tokenizers/t5\.json"):
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
from fluxdeploy.bundle.manifest import FileRecord, TokenizerRecord
from fluxdeploy.text import load_tokenizers
manifest = SimpleNamespace(tokenizers={records!r})
tokenizers = load_tokenizers(Bundle(Path({str(tmp_path)!r}), manifest, ""))
tokenizers.clip(["a cat"]), tokenizers.t5(["a cat"])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
