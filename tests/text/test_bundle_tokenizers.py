"""The tokenizers of a bundle come from its manifest, and need neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxdeploy import text
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.errors import BundleError
from fluxdeploy.text import TOKENIZER_FILES, load_tokenizers


def bundle(root: Path, **tokenizers: TokenizerRecord) -> Any:
    return SimpleNamespace(root=root, manifest=SimpleNamespace(tokenizers=tokenizers))


def test_lengths_and_folders_come_from_the_manifest(demo: Mapping[str, Path]) -> None:
    clip = TokenizerRecord(folder="tokenizer", max_length=77, files=())
    t5 = TokenizerRecord(folder="tokenizer_2", max_length=256, files=())
    tokenizers = load_tokenizers(bundle(demo["model"], clip=clip, t5=t5))
    assert tokenizers.clip(["a cat", ""]).shape == (2, 77)
    assert tokenizers.t5(["a cat"], 128).shape == (1, 128)
    assert tokenizers.t5(["a cat"]).shape == (1, 256)


def test_a_manifest_without_tokenizers_is_refused(demo: Mapping[str, Path]) -> None:
    clip = TokenizerRecord(folder="tokenizer", max_length=77, files=())
    with pytest.raises(BundleError, match="no tokenizer t5"):
        load_tokenizers(bundle(demo["json"], clip=clip))


def test_the_files_to_copy_are_all_that_the_demo_writes(demo: Mapping[str, Path]) -> None:
    for root in demo.values():
        names = {path.name for path in root.rglob("*") if path.is_file()}
        assert names <= set(TOKENIZER_FILES)


def test_public_names_exist() -> None:
    assert sorted(text.__all__) == text.__all__
    assert all(hasattr(text, name) for name in text.__all__)


def test_tokens_without_torch_transformers_and_protobuf(demo: Mapping[str, Path]) -> None:
    program = f"""
import sys
for name in ("torch", "transformers", "google.protobuf", "sentencepiece", "onnx"):
    sys.modules[name] = None
from pathlib import Path
from fluxdeploy.text import load_clip_tokenizer, load_t5_tokenizer
for root in {[str(root) for root in demo.values()]}:
    load_clip_tokenizer(Path(root, "tokenizer")).encode(["a cat"])
    load_t5_tokenizer(Path(root, "tokenizer_2")).encode(["a cat"])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
