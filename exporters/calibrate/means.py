"""What linears read, in the mean and how it varies, as `calibration.json` has it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exporters.components.chain import Chain
from exporters.components.run import linear_modules, shared_inputs
from exporters.formats.moments import MomentsError, decode_moments
from fluxdeploy.bundle.tensorfile import from_float32, to_float32
from fluxdeploy.bundle.typed_json import FieldError

__all__ = ["Means", "Moments", "encode_bytes", "encode_mean", "spread_means", "spread_moments"]

_Found = TypeVar("_Found")

Means = Mapping[str, str]
"""Of a component: by the first of the linears that read it, an input's channels' means, [in], as
bfloat16 in base64."""

Moments = Mapping[str, str]
"""The same of its second moments: the bytes of `encode_moments` in base64."""


def encode_bytes(raw: NDArray[np.uint8]) -> str:
    """The text of an input's moments."""
    return base64.b64encode(raw.tobytes()).decode()


def encode_mean(mean: NDArray[np.float32]) -> str:
    """The text of an input's means, float32 [in]."""
    return base64.b64encode(from_float32(mean, "BF16").tobytes()).decode()


def spread_means(chain: Chain, means: Means) -> dict[str, NDArray[np.float32]]:
    """The means of what each linear of a chain reads, float32 [in], by its name.

    Raises `FieldError` for a text that is no such means, or that is of another chain.
    """
    return _spread(chain, means, _decode_mean)


def spread_moments(chain: Chain, moments: Moments) -> dict[str, NDArray[np.uint8]]:
    """The moments of what each linear of a chain reads, by its name, as `encode_moments` has them.

    Raises `FieldError` as `spread_means` does.
    """

    def decode(name: str, text: str, columns: int) -> NDArray[np.uint8]:
        raw = _bytes(name, text, "moments")
        try:
            decode_moments(raw, columns)
        except MomentsError as error:
            raise FieldError(f"[{name}]", str(error)) from error
        return raw

    return _spread(chain, moments, decode)


def _spread(
    chain: Chain, texts: Mapping[str, str], decode: Callable[[str, str, int], _Found]
) -> dict[str, _Found]:
    if not texts:
        return {}
    columns = {
        stage.scope + name: module.in_features
        for stage in chain.stages
        for name, module in linear_modules(stage.piece).items()
    }
    first = shared_inputs(chain)
    for name in texts:
        if first.get(name) != name:
            raise FieldError(f"[{name}]", "is no input of this checkpoint's layers")
    decoded = {name: decode(name, text, columns[name]) for name, text in texts.items()}
    return {name: decoded[of] for name, of in first.items() if of in decoded}


def _bytes(name: str, text: str, what: str) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except (binascii.Error, ValueError) as error:
        raise FieldError(f"[{name}]", f"is not {what} in base64 ({error})") from error


def _decode_mean(name: str, text: str, columns: int) -> NDArray[np.float32]:
    stored = _bytes(name, text, "bfloat16")
    if len(stored) % 2:
        raise FieldError(f"[{name}]", f"is not bfloat16 in base64 ({len(stored)} bytes)")
    raw = stored.view(np.uint16)
    if len(raw) != columns:
        raise FieldError(f"[{name}]", f"has {len(raw)} channels, not {columns}")
    mean = to_float32(raw, "BF16")
    if not np.isfinite(mean).all():
        raise FieldError(f"[{name}]", "holds NaN or infinity")
    return mean
