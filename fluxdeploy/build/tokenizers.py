"""A tokenizer of the bundle: one canonical file, whatever the checkpoint's folder holds."""

from __future__ import annotations

import hashlib
import importlib.metadata
from typing import TYPE_CHECKING

from fluxdeploy.build.keys import digest
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import TokenizerRecord

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from exporters.tokenizers import CanonicalTokenizer

__all__ = ["make_tokenizer", "read_tokenizer"]

_TOOLS = ("transformers", "tokenizers")


def read_tokenizer(name: str, checkpoint: Checkpoint) -> CanonicalTokenizer:
    """The tokenizer of a text encoder as a bundle has it.

    Raises `CheckpointError` for a folder that is missing or broken.
    """
    from exporters.tokenizers import canonical_tokenizer

    longest = checkpoint.max_text_tokens if name == "t5" else None
    return canonical_tokenizer(checkpoint.tokenizer(name), name, longest)


def make_tokenizer(name: str, run: BuildRun) -> TokenizerRecord:
    """Put the tokenizer of a text encoder into the staging folder.

    Raises what `read_tokenizer` does.
    """
    made = read_tokenizer(name, run.spec.checkpoint)
    data = made.text.encode()
    path, artifact = f"tokenizers/{name}.json", f"tokenizer.{name}"
    tools = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
    # The folder's files are in it by what transformers made of them.
    key = digest({"sha256": hashlib.sha256(data).hexdigest(), "tools": tools})
    files = run.staging.finished(artifact, key)
    if files is None:
        target = run.staging.root / path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
        files = run.staging.record(artifact, key, [target])
    return TokenizerRecord(
        path=path,
        max_length=made.max_length,
        pad_id=made.pad_id,
        prefix=made.prefix,
        suffix=made.suffix,
        padding_side=made.padding_side,
        truncation_side=made.truncation_side,
        files=files,
    )
