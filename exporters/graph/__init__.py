"""ONNX graphs: `trace` makes one of a chain, `quantize` and `fuse` rewrite it."""
