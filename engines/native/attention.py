"""Attention through cuDNN's graphs, in bfloat16 and in 8 bits; no PyTorch, plain addresses.

The operations are `sdpa` and `sdpa_fp8` of cuDNN's front end:
https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.native.plan import Attention, Kind
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command

__all__ = ["SCALAR_BYTES", "Cudnn", "PreparedAttention", "scalars"]

_SLOT = 16
_NAMES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_MAXIMA = 2
SCALAR_BYTES = _SLOT * (len(_NAMES) + _MAXIMA)
"""Of the numbers beside an attention in 8 bits: its scales, and two maxima that it writes."""


def scalars(step: Attention) -> NDArray[np.float32]:
    """The scales of an attention in 8 bits as they lie on the device, SCALAR_BYTES of them."""
    q, k, v = step.scales
    values = (q, k, v, step.softmax_scale, 1 / step.softmax_scale, 1 / step.out_scale)
    block = np.zeros((SCALAR_BYTES // _SLOT, _SLOT // 4), np.float32)
    block[: len(values), 0] = values
    return block.ravel()


@dataclass(frozen=True)
class PreparedAttention:
    """Attention of one size, compiled. `workspace` is the bytes that a call needs on the device."""

    workspace: int
    handle: Any
    graph: Any
    maxima: int

    def launch(self, x: Sequence[int], out: int, numbers: int, workspace: int) -> None:
        """Queue it: addresses of Q, K and V, of the result, and of the scales in 8 bits."""
        pointers = dict(enumerate((*x, out)))
        if self.maxima:
            for index in range(len(_NAMES) + self.maxima):
                pointers[4 + index] = numbers + _SLOT * index
        try:
            self.graph.execute(pointers, workspace, handle=self.handle)
        except RuntimeError as error:  # the binding's own
            raise EngineError(f"cuDNN's attention failed: {error}.") from error


class Cudnn:
    """cuDNN on one stream of the current device.

    Raises `MissingDependencyError` where its front end is not installed, and `EngineError` where
    the library does not start.
    """

    def __init__(self, stream: int) -> None:
        try:
            self._module: Any = importlib.import_module("cudnn")
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"cuDNN's front end cannot be imported ({error}): {install_command('native')}."
            ) from error
        try:
            self._handle: Any = self._module.create_handle()
            self._module.set_stream(handle=self._handle, stream=stream)
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"cuDNN does not start: {error}. Look at the NVIDIA driver and the memory of the "
                "GPU: `nvidia-smi`."
            ) from error

    def prepare(
        self, kind: Kind, tokens: int, heads: int, head_dim: int, strides: Mapping[str, int]
    ) -> PreparedAttention:
        """Attention over `tokens`; Q, K and V, and the result, have rows `strides` numbers apart.

        Scores are Q Kᵀ as they are: Q comes with its scale. Raises `EngineError` where cuDNN has no
        kernel for it.
        """
        try:
            return self._prepare(kind, tokens, heads, head_dim, strides)
        except (RuntimeError, self._module.cudnnGraphNotSupportedError) as error:
            raise EngineError(
                f"cuDNN {self._module.backend_version_string()} has no attention in {kind} for "
                f"{tokens} tokens with {heads} heads of {head_dim}: {error}."
            ) from error

    def _prepare(
        self, kind: Kind, tokens: int, heads: int, head_dim: int, strides: Mapping[str, int]
    ) -> PreparedAttention:
        types = self._module.data_type
        element = {"bf16": types.BFLOAT16, "fp8": types.FP8_E4M3}[kind]
        graph = self._module.pygraph(
            intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=self._handle
        )
        dim = [1, heads, tokens, head_dim]

        def stride(row: int) -> list[int]:
            return [tokens * row, head_dim, row, 1]

        q, k, v = (
            graph.tensor(dim=dim, stride=stride(strides["x"]), data_type=element, uid=uid)
            for uid in range(3)
        )
        maxima: list[Any] = []
        if kind == "fp8":
            numbers = {
                name: graph.tensor(
                    dim=[1] * 4, stride=[1] * 4, data_type=types.FLOAT, uid=4 + index
                )
                for index, name in enumerate(_NAMES)
            }
            out, _, *maxima = graph.sdpa_fp8(
                q=q, k=k, v=v, is_inference=True, attn_scale=1.0, **numbers
            )
        else:
            out, _ = graph.sdpa(q=q, k=k, v=v, is_inference=True, attn_scale=1.0)
        out.set_output(True).set_uid(3).set_data_type(element)
        out.set_dim(dim).set_stride(stride(strides["out"]))
        for index, largest in enumerate(maxima):
            largest.set_output(True).set_uid(4 + len(_NAMES) + index).set_data_type(types.FLOAT)
            largest.set_dim([1] * 4).set_stride([1] * 4)
        modes = self._module.heur_mode
        graph.build([modes.A, modes.FALLBACK])
        return PreparedAttention(graph.get_workspace_size(), self._handle, graph, len(maxima))

    def close(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with suppress(RuntimeError):  # on a GPU that was lost
                self._module.destroy_handle(handle)
