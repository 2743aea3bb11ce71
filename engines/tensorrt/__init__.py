"""TensorRT and TensorRT-RTX: `runtime` says what they can, `build` and `fusion` make engines and
hold their kernels against what was asked, `loaded` and `run` run them.
"""
