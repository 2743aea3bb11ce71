"""Products through cuDNN's graphs, for `gpu_kernels_worker.py`.

What it returns is a call over tensors that stay where they are, and what tells its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cudnn
import torch
from torch import Tensor

__all__ = ["linear"]

Call = tuple[Callable[[], None], Callable[[], Tensor]]

_KINDS = {
    torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float32: cudnn.data_type.FLOAT,
}


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Call:
    """x Wᵀ · scale + bias, for x [M,K] and weight [N,K] in one type; scale and bias [N] float32."""
    handle, graph = _new_graph()
    out = torch.full((1, len(x), len(weight)), float("nan"), device="cuda", dtype=torch.bfloat16)
    given = (x[None], weight.t()[None], scale[None, None], bias[None, None])
    a, b, s, c = (_symbol(graph, tensor) for tensor in given)
    y = _output(graph.add(a=graph.mul(a=graph.matmul(A=a, B=b), b=s), b=c), out)
    tensors = dict(zip((a, b, s, c, y), (*given, out), strict=True))
    return _call(handle, graph, tensors), lambda: out[0]


def _new_graph() -> tuple[Any, Any]:
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kind = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(intermediate_data_type=kind, compute_data_type=kind, handle=handle)
    return handle, graph


def _symbol(graph: Any, x: Tensor) -> Any:
    return graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=_KINDS[x.dtype])


def _output(symbol: Any, x: Tensor) -> Any:
    """A result of a graph, written to a tensor."""
    symbol.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
    return symbol.set_data_type(_KINDS[x.dtype])


def _call(handle: Any, graph: Any, tensors: Mapping[Any, Tensor]) -> Callable[[], None]:
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    size = max(1, graph.get_workspace_size())
    workspace = torch.empty(size, device="cuda", dtype=torch.uint8)
    pointers = {symbol: tensor.data_ptr() for symbol, tensor in tensors.items()}
    kept = (workspace, *tensors.values())  # cuDNN knows only where they are

    def run() -> None:
        graph.execute(pointers, kept[0].data_ptr(), handle=handle)

    return run
