"""Emulation: the numbers of any bundle on a CPU, whatever its engines are for.

`graph` rewrites a component's graph to one that ONNX Runtime's CPU kernels have, `runtime` opens
it. The one room of `engines` that imports the package `onnx`.
"""
