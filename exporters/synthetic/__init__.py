"""Checkpoints and tokenizers of any size, without training."""
