"""Triton Inference Server: a model repository of a bundle, the model in it, and its client."""
