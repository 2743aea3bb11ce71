"""Checkpoints in, ONNX graphs and their weights out. Needs PyTorch; hosts never import it.

The way of a component: `checkpoint` reads headers and configs, `components` describes the networks
of `models` as a `chain` of stages, `trace` makes one ONNX graph of it, `bind` points its weights
into safetensors files, `export` writes and checks the result. `reference` runs the same chain in
PyTorch, and `golden` records what it gives.
"""
