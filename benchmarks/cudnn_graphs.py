"""Products and attention through cuDNN's graphs, for `gpu_kernels_worker.py`.

Each function returns a call over tensors that stay where they are, and what tells its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cudnn
import torch
from torch import Tensor

__all__ = ["attention", "attention_in_8_bits", "linear"]

Call = tuple[Callable[[], None], Callable[[], Tensor]]

_KINDS = {
    torch.float8_e4m3fn: cudnn.data_type.FP8_E4M3,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float32: cudnn.data_type.FLOAT,
}
_LARGEST = 448.0


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Call:
    """x Wᵀ · scale + bias, for x [M,K] and weight [N,K] in one type; scale and bias [N] float32."""
    handle, graph = _new_graph()
    out = torch.full((1, len(x), len(weight)), float("nan"), device="cuda", dtype=torch.bfloat16)
    given = (x[None], weight.t()[None], scale[None, None], bias[None, None])
    a, b, s, c = (_symbol(graph, tensor) for tensor in given)
    y = _output(graph.add(a=graph.mul(a=graph.matmul(A=a, B=b), b=s), b=c), out)
    tensors = dict(zip((a, b, s, c, y), (*given, out), strict=True))
    return _call(handle, graph, tensors), lambda: out[0]


def attention(joint: Tensor) -> Call:
    """Attention of [tokens,3,heads,head_dim] bfloat16; the result is [heads,tokens,head_dim]."""
    handle, graph = _new_graph()
    given, out = _views(joint), _views(torch.full_like(joint[:, :1], float("nan")))[0]
    q, k, v = (_symbol(graph, x) for x in given)
    o, _ = graph.sdpa(q=q, k=k, v=v, is_inference=True, attn_scale=joint.shape[-1] ** -0.5)
    tensors = dict(zip((q, k, v, _output(o, out)), (*given, out), strict=True))
    return _call(handle, graph, tensors), lambda: out[0]


def attention_in_8_bits(joint: Tensor, scale: Tensor) -> Call:
    """The same of E4M3 numbers with one scale, to E4M3; the softmax's largest number is 1."""
    handle, graph = _new_graph()
    poison = torch.full(joint[:, :1].shape, float("nan"), device="cuda").to(joint.dtype)
    given, out = _views(joint), _views(poison)[0]
    # No result is larger than the largest of V.
    numbers = {
        "descale_q": scale,
        "descale_k": scale,
        "descale_v": scale,
        "descale_s": 1 / _LARGEST,
        "scale_s": _LARGEST,
        "scale_o": 1 / scale,
    }
    scales = [torch.full((1, 1, 1, 1), float(n), device="cuda") for n in numbers.values()]
    q, k, v, *symbols = (_symbol(graph, x) for x in (*given, *scales))
    o, _, *maxima = graph.sdpa_fp8(
        q=q,
        k=k,
        v=v,
        is_inference=True,
        attn_scale=joint.shape[-1] ** -0.5,
        **dict(zip(numbers, symbols, strict=True)),
    )
    seen = [torch.zeros(1, 1, 1, 1, device="cuda") for _ in maxima]
    outputs = [_output(symbol, x) for symbol, x in zip((o, *maxima), (out, *seen), strict=True)]
    tensors = dict(zip((q, k, v, *symbols, *outputs), (*given, *scales, out, *seen), strict=True))
    return _call(handle, graph, tensors), lambda: out[0].float() * scale


def _views(joint: Tensor) -> tuple[Tensor, ...]:
    """[tokens,n,heads,head_dim], as a linear leaves it, as n of [1,heads,tokens,head_dim]."""
    return tuple(joint.permute(1, 2, 0, 3)[:, None])


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
