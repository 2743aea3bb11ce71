"""Prompts to token ids, for every form of tokenizer folder, without transformers."""

from __future__ import annotations

from fluxdeploy.text.bundle import Tokenizers, load_tokenizers
from fluxdeploy.text.clip import load_clip_tokenizer
from fluxdeploy.text.folder import TOKENIZER_FILES
from fluxdeploy.text.t5 import load_t5_tokenizer
from fluxdeploy.text.tokenizer import Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "Tokenizer",
    "Tokenizers",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
    "load_tokenizers",
]
