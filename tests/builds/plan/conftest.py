"""Checkpoints to plan for: the default model, and FLUX.1-dev's headers without data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from exporters import tokenizers
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.synthetic.sparse_checkpoint import FLUX_DEV, write_sparse_checkpoint
from fluxdeploy.build.checkpoint import find_checkpoint
from tests.support.shared_folder import SharedFolder


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return find_checkpoint(None)


@pytest.fixture(scope="session")
def flux_dev(shared_folder: SharedFolder) -> Checkpoint:
    folder = shared_folder.entry(
        "sparse-dev", lambda folder: write_sparse_checkpoint(folder, FLUX_DEV)
    )
    return open_checkpoint(folder)


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_read_once() -> Iterator[None]:
    """Reading one takes longer than all else of a plan, which has nothing to say of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tokenizers, "canonical_tokenizer", functools.cache(tokenizers.canonical_tokenizer)
        )
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundle"
