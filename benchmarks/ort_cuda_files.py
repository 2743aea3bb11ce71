"""Names of what `ort_cuda_graphs.py` writes and `ort_cuda_worker.py` reads."""

__all__ = ["GRAPHS", "LAYOUT", "WEIGHTS"]

GRAPHS = ("casts", "narrow")
LAYOUT = "layout.json"
WEIGHTS = "weights.bin"
