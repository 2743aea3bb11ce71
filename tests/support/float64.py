"""diffusers and transformers in float64 throughout, for what their formulas give without rounding.

Both name float32 in their code, whatever the type of the weights: norms, softmaxes, RoPE and the
scheduler compute in it. `exact_arithmetic` gives them float64 for it.

One thing is left as float32 rounds it, in both types: the angles of the timestep embedding, which
reach 1000 radians, where the last bit of a frequency moves a picture by more than all other
rounding together. Which bit that is depends on the processor's exponential. `pinned_angles` fixes
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["exact_arithmetic", "pinned_angles", "timestep_angles"]


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """float64 wherever code asks torch for float32, of parameters in float64.

    Random numbers are those that float32 draws, made wide.
    """
    before, from_numpy = torch.get_default_dtype(), torch.from_numpy

    def wide_from_numpy(array: np.ndarray) -> torch.Tensor:
        tensor = from_numpy(array)
        return tensor.double() if tensor.dtype == torch.float32 else tensor

    torch.set_default_dtype(torch.float64)
    try:
        # A mode does not see `from_numpy`.
        with _Widened(), patch("torch.from_numpy", wide_from_numpy):
            yield
    finally:
        torch.set_default_dtype(before)


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*wide, **kwargs)


def timestep_angles(timesteps: np.ndarray) -> np.ndarray:
    """The angles of FLUX's timestep embedding as float32 rounds them, [N,128].

    `timesteps` are in 0..1000. A frequency is the nearest float32 to the exponential of an exponent
    that is rounded as in diffusers; sines and cosines of the angles are left to the caller.
    """
    exponents = np.float32(-math.log(10000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    return timesteps.astype(np.float32)[:, None] * frequencies


@contextmanager
def pinned_angles() -> Iterator[None]:
    """Let diffusers take the angles of its timestep embedding from `timestep_angles`."""

    def embedding(timesteps: torch.Tensor, dim: int, **options: Any) -> torch.Tensor:
        assert dim == 256
        assert options == {"flip_sin_to_cos": True, "downscale_freq_shift": 0, "scale": 1}
        angles = timestep_angles(timesteps.numpy()).astype(np.float64)
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        return torch.from_numpy(both).to(timesteps.dtype)

    with patch("diffusers.models.embeddings.get_timestep_embedding", embedding):
        yield
