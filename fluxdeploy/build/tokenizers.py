"""A tokenizer of the bundle."""

from __future__ import annotations

import hashlib

from fluxdeploy.build.keys import digest
from fluxdeploy.build.run import BuildRun
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.text import TOKENIZER_FILES, load_clip_tokenizer, load_t5_tokenizer

__all__ = ["make_tokenizer"]

_FOLDERS = {"clip": "tokenizer", "t5": "tokenizer_2"}


def make_tokenizer(name: str, run: BuildRun) -> TokenizerRecord:
    """Put the tokenizer of a text encoder into the staging folder."""
    source = run.spec.checkpoint.tokenizer(name)
    contents = {
        file: (source / file).read_bytes() for file in TOKENIZER_FILES if (source / file).is_file()
    }
    if name == "clip":
        length = load_clip_tokenizer(source).max_length
    else:
        length = load_t5_tokenizer(source, run.spec.checkpoint.max_text_tokens).max_length
    artifact = f"tokenizer.{name}"
    key = digest({file: hashlib.sha256(data).hexdigest() for file, data in contents.items()})
    files = run.staging.finished(artifact, key)
    if files is None:
        target = run.staging.root / _FOLDERS[name]
        target.mkdir(exist_ok=True)
        for file, data in contents.items():
            (target / file).write_bytes(data)
        files = run.staging.record(artifact, key, [target / file for file in contents])
    return TokenizerRecord(_FOLDERS[name], length, files)
