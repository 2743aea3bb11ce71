"""Prompts to token ids, from the bundle's `tokenizer.json` files alone."""

from __future__ import annotations

from fluxdeploy.text.bundle import Tokenizers, load_tokenizers
from fluxdeploy.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "Tokenizers", "load_tokenizers"]
