"""The scale of a LoRA's factors: what alpha and rank of its file make of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fluxdeploy.bundle.tensorfile import TensorFile, read_tensor
from fluxdeploy.bundle.typed_json import load_strict
from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora.keys import Key
from fluxdeploy.lora.lora import read_float32

__all__ = ["Scales"]

_METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's settings as JSON, each with its part's name before it."""

_PREFIXES = {"transformer": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."}
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


class Scales:
    """Of one file. A tensor `alpha` of a module comes before the file's metadata; 1 is without."""

    def __init__(self, file: TensorFile) -> None:
        """Raises `CheckpointError` for metadata that is no JSON object, or that asks for DoRA."""
        self._file = file
        self._settings = _settings(file)
        for name, value in self._settings.items():
            if name.endswith("use_dora") and value:
                raise CheckpointError(f"{file.path} is DoRA, says its metadata; it is not read.")

    def of(self, alpha: Key | None, down: Key, rank: int) -> float:
        """The number that up @ down is multiplied with. Raises `CheckpointError` for a bad one."""
        if alpha is not None:
            return self._alpha(alpha) / rank
        settings = self._of_part(down.part)
        pattern = settings.get("alpha_pattern")
        number = settings.get("lora_alpha", rank)
        if isinstance(pattern, Mapping):
            for module, value in pattern.items():
                if module.removeprefix("^") == down.module or down.module.endswith(f".{module}"):
                    number = value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise CheckpointError(
                f"The metadata of {self._file.path} has {number!r} as alpha of {down.text}; "
                "it is a number."
            )
        return number / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _of_part(self, part: str) -> Mapping[str, Any]:
        prefix = _PREFIXES[part]
        own = {
            name.removeprefix(prefix): value
            for name, value in self._settings.items()
            if name.startswith(prefix)
        }
        return own or (self._settings if part == "transformer" else {})

    def _alpha(self, key: Key) -> float:
        entry = self._file.tensors[key.text]
        if math.prod(entry.shape) != 1:
            raise CheckpointError(
                f"Tensor {key.text} of {self._file.path} has shape {list(entry.shape)}; "
                "an alpha is one number."
            )
        if entry.dtype in _INTEGERS:
            return float(np.ravel(read_tensor(self._file, key.text))[0])
        return float(np.ravel(read_float32(self._file, key.text))[0])


def _settings(file: TensorFile) -> Mapping[str, Any]:
    text = file.metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        settings = load_strict(text)
    except ValueError as error:
        raise CheckpointError(f"The {_METADATA} of {file.path} is not JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"The {_METADATA} of {file.path} is not a JSON object.")
    return settings
