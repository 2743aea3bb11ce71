"""What a checkpoint says of itself, held against what it holds.

A config.json that its tensors contradict belongs to another checkpoint, or to a whole one of which
a part is missing. Either way some picture would come out, and nobody could tell that it is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint.tensors import StoredTensor
from fluxdeploy.errors import CheckpointError

__all__ = [
    "check_class",
    "check_index",
    "check_said",
    "check_same",
    "unknown_keys",
]

_CLASSES = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")

_CHUNK = 1 << 22
"""Elements that are compared at a time."""


def check_said(who: str, config: Mapping[str, Any], found: Mapping[str, object]) -> None:
    """Hold what a config.json says against `found`, what the tensors say of the same keys.

    A key that it lacks says nothing. Raises `CheckpointError`, naming both sides.
    """
    for key, has in found.items():
        if key not in config:
            continue
        said = config[key]
        same = tuple(said) == has if isinstance(said, list) else said == has
        if not same or isinstance(said, bool) != isinstance(has, bool):
            shown = json.dumps(said)
            raise CheckpointError(
                f"The {who}'s config.json says {key} {shown[:80]}, and its tensors say "
                f"{json.dumps(has)}: they are not of one checkpoint, or a part of it is missing. "
                "Download both again."
            )


def check_class(who: str, config: Mapping[str, Any], name: str) -> None:
    """Raise `CheckpointError` for the config.json of another class than `name` of diffusers."""
    said = config.get("_class_name", name)
    if said != name:
        raise CheckpointError(
            f"The {who}'s config.json is one of a {said!r:.80}; FLUX.1 has a {name} there, and "
            "nothing else is computed."
        )


def check_index(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Hold model_index.json's classes against those that are computed here.

    Returns a sentence for each entry that is not followed. Raises `CheckpointError` for another
    class.
    """
    unused = []
    for name, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name in _CLASSES and kind not in (None, _CLASSES[name]):
            raise CheckpointError(
                f"model_index.json says that {name} is a {kind!r:.80}; {_CLASSES[name]} is the one "
                "that is computed."
            )
        known = name in _CLASSES or name in _TOKENIZERS or name.startswith("_")
        if not known and entry not in (None, [None, None]):
            unused.append(name)
    return _told("model_index.json", unused)


def unknown_keys(where: str, config: Mapping[str, Any], known: Collection[str]) -> tuple[str, ...]:
    """A sentence on the keys of a config that nobody here knows; empty without any.

    Keys that begin with an underscore are notes of whoever saved it.
    """
    return _told(where, [key for key in config if key not in known and not key.startswith("_")])


def _told(where: str, keys: list[str]) -> tuple[str, ...]:
    if not keys:
        return ()
    shown = ", ".join(f"{key:.40}" for key in sorted(keys)[:8])
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return (f"{where} sets {shown}{more}, which is not known here and not followed",)


def check_same(first: StoredTensor, second: StoredTensor) -> None:
    """Raise `CheckpointError` where two stored tensors that must be one are not equal."""
    if first.shape == second.shape and all(
        one.tobytes() == other.tobytes() for one, other in _pairs(first, second)
    ):
        return
    raise CheckpointError(
        f"{first.name} in {first.file} and {second.name} in {second.file} stand for one tensor and "
        "differ, as after a merge that touched one of them; libraries disagree on which counts. "
        "Save the checkpoint again from the model that draws as it should."
    )


def _pairs(
    first: StoredTensor, second: StoredTensor
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The values of two tensors of one shape, a part at a time."""
    count = math.prod(first.shape)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        yield first.read(start, stop), second.read(start, stop)
