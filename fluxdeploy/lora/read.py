"""Reads a LoRA file, holds every key of it against the base, and refuses what it cannot use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fluxdeploy.bundle.tensorfile import TensorFile, read_header
from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora.families import other_family
from fluxdeploy.lora.keys import Key, Role, parse_key, refused_kind
from fluxdeploy.lora.lora import Linears, Lora, LowRank, read_float32
from fluxdeploy.lora.scales import Scales
from fluxdeploy.lora.targets import Targets

__all__ = ["read_lora"]

_Pair = Mapping[Role, Key]

_ENCODERS = {"clip": "the text encoder CLIP", "t5": "the text encoder T5"}

# CLIP's last projection makes what other models read and FLUX.1 does not.
_UNUSED = ("clip", "text_projection")


def read_lora(path: str | os.PathLike[str], linears: Linears, without: Sequence[str] = ()) -> Lora:
    """A LoRA file of any trainer as low-rank changes of a base's linears.

    Every tensor is read once, one at a time, and checked; the result reads them again when it is
    asked for factors, and so holds none. Changes of zeros alone are left out, since they change
    nothing.

    without: parts whose changes are left out, where `linears` lacks them: `Lora.left_out` has those
        that the file has.

    Raises `CheckpointError`, which names the file and the key: for what is no safetensors file, is
    cut off or is empty; for keys that name no linear of the base, or a part that `linears` lacks;
    for half a pair; for ranks and sizes that do not fit each other or the base, as those of another
    model's LoRA; for NaN and infinity; and for kinds that are no plain LoRA, such as DoRA, LoKr,
    LoHa and control LoRAs.
    """
    file = read_header(path)
    keys = _parse(file)
    scales = Scales(file)
    changes: dict[str, dict[str, LowRank]] = {}
    kept, left_out = _without(file, keys, without)
    for pair, names in _located(file, kept, linears):
        part = _down(pair).part
        known = changes.setdefault(part, {})
        for name, change in _changes(file, pair, names, linears[part], scales).items():
            if name in known and not _same(known[name], change):
                raise CheckpointError(
                    f"{file.path} changes {name} twice, by {known[name].down_key} and by "
                    f"{change.down_key}: keep one of the two sets of keys."
                )
            known[name] = change
    ranked = {
        part: {name: change for name, change in found.items() if change.rank}
        for part, found in changes.items()
    }
    ranked = {part: found for part, found in ranked.items() if found}
    if not ranked and left_out:
        names_of = " and ".join(_ENCODERS[part] for part in left_out)
        raise CheckpointError(
            f"{file.path} changes {names_of} alone, which cannot be changed here. Merge it with "
            "`fluxdeploy build --lora`."
        )
    if not ranked:
        raise CheckpointError(
            f"{file.path} changes nothing: all its factors are zero. It was not trained."
        )
    return Lora(file.path, ranked, left_out)


def _without(
    file: TensorFile, keys: Sequence[Key], parts: Sequence[str]
) -> tuple[list[Key], tuple[str, ...]]:
    """The keys of other parts than these, and which of these the file changes."""
    changed = {
        key.part
        for key in keys
        if key.part in parts
        and (key.part, key.module) != _UNUSED
        and key.role == "up"
        and read_float32(file, key.text).any()
    }
    kept = [key for key in keys if key.part not in parts]
    return kept, tuple(part for part in parts if part in changed)


def _parse(file: TensorFile) -> list[Key]:
    """The keys of the file, but for differences of zeros."""
    if not file.tensors:
        raise CheckpointError(f"{file.path} holds no tensors: it is not a LoRA.")
    parsed: list[Key] = []
    unknown: list[str] = []
    for text in file.tensors:
        kind = refused_kind(text)
        if kind is not None:
            raise CheckpointError(
                f"{file.path} is {kind}, by its key {text}, which is not read. "
                "Use a plain LoRA, or merge this one into the checkpoint with the tool it is from."
            )
        key = parse_key(text)
        if key is None:
            unknown.append(text)
        elif key.role != "difference":
            parsed.append(key)
        elif read_float32(file, text).any():
            raise CheckpointError(
                f"{file.path} adds to whole tensors, by its key {text}, which is not read. "
                "Extract it again as a LoRA without norms and biases."
            )
    if unknown:
        raise _unmatched(file, unknown, "are no LoRA's" if parsed else "are those of no LoRA")
    return parsed


def _located(
    file: TensorFile, keys: Iterable[Key], linears: Linears
) -> list[tuple[_Pair, tuple[str, ...]]]:
    """The pairs of factors, each with the linears that it changes."""
    modules: dict[tuple[str, str], dict[Role, Key]] = {}
    for key in keys:
        pair = modules.setdefault((key.part, key.module), {})
        if key.role in pair:
            raise CheckpointError(
                f"{file.path} has two tensors for one factor, {pair[key.role].text} and "
                f"{key.text}: keep one."
            )
        pair[key.role] = key
    targets = {part: Targets(names) for part, names in linears.items()}
    found: list[tuple[_Pair, tuple[str, ...]]] = []
    unmatched: list[str] = []
    for (part, module), pair in modules.items():
        _check_whole(file, pair)
        if (part, module) == _UNUSED:
            continue
        any_key = _down(pair)
        names = targets[part].find(module, any_key.flat) if part in targets else None
        if names is not None:
            found.append((pair, names))
        elif read_float32(file, pair["up"].text).any():
            unmatched.append(any_key.text)
    if unmatched:
        raise _unmatched(file, unmatched, "name no linear of this model", found=bool(found))
    return found


def _check_whole(file: TensorFile, pair: _Pair) -> None:
    have = next(iter(pair.values())).text
    lacks = [role for role in ("down", "up") if role not in pair]
    if lacks:
        raise CheckpointError(
            f"{file.path} has {have} and lacks its factor `{lacks[0]}` (lora_"
            f"{'A' if lacks[0] == 'down' else 'B'}): the file is incomplete. Fetch it again."
        )


def _down(pair: _Pair) -> Key:
    return pair["down"]


def _unmatched(
    file: TensorFile, keys: Sequence[str], problem: str, found: bool = False
) -> CheckpointError:
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    family = other_family(keys)
    if family is not None:
        reason = f"It is a LoRA of {family}, and only those of FLUX.1 are read."
    else:
        parts = {key.part for text in keys if (key := parse_key(text))} & set(_ENCODERS)
        if found and parts:
            reason = (
                f"They change {' and '.join(_ENCODERS[part] for part in sorted(parts))}, "
                "which cannot be changed here, or has no such layers."
            )
        else:
            reason = "It is of another model, or of one with more blocks."
    return CheckpointError(f"{len(keys)} keys of {file.path} {problem}: {shown}. {reason}")


def _changes(
    file: TensorFile,
    pair: _Pair,
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, int]],
    scales: Scales,
) -> dict[str, LowRank]:
    """What one pair changes, by linear."""
    down, up = pair["down"], pair["up"]
    rank = _check_shapes(file, down, up, names, shapes)
    scale = scales.of(pair.get("alpha"), down, rank)
    read_float32(file, down.text)
    values = read_float32(file, up.text)
    changes: dict[str, LowRank] = {}
    start = 0
    for name in names:
        stop = start + shapes[name][0]
        columns = np.flatnonzero(values[start:stop].any(axis=0))
        changes[name] = LowRank(
            file, down.text, up.text, start, stop, tuple(columns.tolist()), scale
        )
        start = stop
    return changes


def _check_shapes(
    file: TensorFile,
    down: Key,
    up: Key,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
) -> int:
    """The rank of a pair. Raises `CheckpointError` where it fits neither itself nor the base."""
    first, second = file.tensors[down.text].shape, file.tensors[up.text].shape
    have = f"{down.text} of {file.path} has shape {list(first)} and {up.text} has {list(second)}"
    if len(first) != 2 or len(second) != 2:
        raise CheckpointError(f"{have}; each has two axes in a LoRA of FLUX.1's linears.")
    if not first[0] == second[1] > 0:
        raise CheckpointError(
            f"{have}; the rank, of the first axis of one and the second of the other, "
            "is one number above 0."
        )
    rows = sum(shapes[name][0] for name in names)
    width = shapes[names[0]][1]
    if (second[0], first[1]) != (rows, width):
        control = (
            " It is a control LoRA, which takes more inputs" if names[0] == "x_embedder" else ""
        )
        raise CheckpointError(
            f"{have}, which change a linear of [{second[0]}, {first[1]}]; {' + '.join(names)} of "
            f"this model is [{rows}, {width}].{control or ' It is a LoRA of another model'}."
        )
    return first[0]


def _same(one: LowRank, other: LowRank) -> bool:
    """Whether two changes are equal: some files hold all their LoRA under two sets of names."""
    return (
        one.scale == other.scale
        and np.array_equal(one.down(), other.down())
        and np.array_equal(one.up(), other.up())
    )
