"""Checkpoints in, ONNX graphs and their weights out. Needs PyTorch; hosts never import it.

The way of a component: `checkpoint` reads headers and configs, `components` declares it as a chain
of stages over the networks of `models`, `graph` makes one ONNX graph of that, `weights` points the
graph into safetensors files, and `export` is the door to all of it. `components.run` runs the same
chain in PyTorch, and `check` holds exports against it.
"""

import fluxdeploy.errors  # noqa: F401 - with its package, which switches telemetry off
