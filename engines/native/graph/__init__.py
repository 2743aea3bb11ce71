"""Exported transformers, read node by node. It needs the package `onnx_ir`."""
