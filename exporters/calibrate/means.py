"""The mean of each channel of what linears read, as `calibration.json` has it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from exporters.components.chain import Chain
from exporters.components.run import linear_modules, shared_inputs
from fluxdeploy.bundle.tensorfile import from_float32, to_float32
from fluxdeploy.bundle.typed_json import FieldError

__all__ = ["Means", "encode_mean", "spread_means"]

Means = Mapping[str, str]
"""Of a component: by the first of the linears that read it, an input's channels' means, [in], as
bfloat16 in base64."""


def encode_mean(mean: NDArray[np.float32]) -> str:
    """The text of an input's means, float32 [in]."""
    return base64.b64encode(from_float32(mean, "BF16").tobytes()).decode()


def spread_means(chain: Chain, means: Means) -> dict[str, NDArray[np.float32]]:
    """The means of what each linear of a chain reads, float32 [in], by its name.

    Raises `FieldError` for a text that is no such means, or that is of another chain.
    """
    if not means:
        return {}
    columns = {
        stage.scope + name: module.in_features
        for stage in chain.stages
        for name, module in linear_modules(stage.piece).items()
    }
    first = shared_inputs(chain)
    for name in means:
        if first.get(name) != name:
            raise FieldError(f"[{name}]", "is no input of this checkpoint's layers")
    decoded = {name: _decode(name, text, columns[name]) for name, text in means.items()}
    return {name: decoded[of] for name, of in first.items() if of in decoded}


def _decode(name: str, text: str, columns: int) -> NDArray[np.float32]:
    try:
        raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint16)
    except (binascii.Error, ValueError) as error:
        raise FieldError(f"[{name}]", f"is not bfloat16 in base64 ({error})") from error
    if len(raw) != columns:
        raise FieldError(f"[{name}]", f"has {len(raw)} channels, not {columns}")
    mean = to_float32(raw, "BF16")
    if not np.isfinite(mean).all():
        raise FieldError(f"[{name}]", "holds NaN or infinity")
    return mean
