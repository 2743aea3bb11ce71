"""Reads a LoRA file, holds every key of it against the base, and refuses what it cannot use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fluxdeploy.bfl_names import graph_names
from fluxdeploy.bundle.tensorfile import TensorFile, read_header
from fluxdeploy.errors import CheckpointError
from fluxdeploy.lora.families import other_family
from fluxdeploy.lora.keys import Key, Role, parse_key, refused_kind
from fluxdeploy.lora.lora import (
    AddedBias,
    Linears,
    Lora,
    LowRank,
    NewNorm,
    read_float32,
)
from fluxdeploy.lora.scales import Scales
from fluxdeploy.lora.targets import Targets

__all__ = ["read_lora"]

_Pair = Mapping[Role, Key]

_ENCODERS = {"clip": "the text encoder CLIP", "t5": "the text encoder T5"}

_FIRST = ("x_embedder",)
"""The linear that reads a token's channels."""

# CLIP's last projection makes what other models read and FLUX.1 does not.
_UNUSED = ("clip", "text_projection")


def read_lora(
    path: str | os.PathLike[str],
    linears: Linears,
    without: Sequence[str] = (),
    norms: Mapping[str, int] | None = None,
) -> Lora:
    """A LoRA file of any trainer as low-rank changes of a base's linears.

    Every tensor is read once, one at a time, and checked; the result reads them again when it is
    asked for factors, and so holds none. Changes of zeros alone are left out, since they change
    nothing.

    without: parts whose changes are left out, where `linears` lacks them: `Lora.left_out` has those
        that the file has.
    norms: the widths of the transformer's norms of queries and keys, by name, where a file may
        also bring others, and add to biases and channels, as control LoRAs do; None where only
        linears can be changed.

    Raises `CheckpointError`, which names the file and the key: for what is no safetensors file, is
    cut off or is empty; for keys that name no linear of the base, or a part that `linears` lacks;
    for half a pair; for ranks and sizes that do not fit each other or the base, as those of another
    model's LoRA; for NaN and infinity; and for kinds that are not read, such as DoRA and LoKr.
    """
    file = read_header(path)
    keys = _parse(file)
    scales = Scales(file)
    changes: dict[str, dict[str, LowRank]] = {}
    biases: dict[str, dict[str, AddedBias]] = {}
    if norms is None:
        _check_plain(file, keys, linears)
    new_norms = _norms(file, keys, norms or {})
    kept, left_out = _without(file, [key for key in keys if key.role != "norm"], without)
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
        biases.setdefault(part, {}).update(_biases(file, pair, names, linears[part], scales))
    ranked = {
        part: {name: change for name, change in found.items() if change.rank}
        for part, found in changes.items()
    }
    ranked = {part: found for part, found in ranked.items() if found}
    biases = {part: found for part, found in biases.items() if found}
    reads = _reads(file, changes, linears)
    if ranked or biases or new_norms or reads:
        return Lora(file.path, ranked, left_out, biases, new_norms, reads)
    if left_out:
        names_of = " and ".join(_ENCODERS[part] for part in left_out)
        raise CheckpointError(
            f"{file.path} changes {names_of} alone, which cannot be changed here. Merge it with "
            "`fluxdeploy build --lora`."
        )
    raise CheckpointError(
        f"{file.path} changes nothing: all its factors are zero. It was not trained."
    )


def _check_plain(file: TensorFile, keys: Iterable[Key], linears: Linears) -> None:
    """Refuse what changes more than linears of the base's own sizes."""
    for key in keys:
        if key.part != "transformer":
            continue
        what = {"norm": "replaces norms", "bias": "adds to biases"}.get(key.role)
        if key.role == "down" and _is_first(key):
            shape = file.tensors[key.text].shape
            if len(shape) == 2 and shape[1] > linears["transformer"].get(_FIRST[0], shape)[1]:
                what = f"takes tokens of {shape[1]} channels"
        if what is not None:
            raise CheckpointError(
                f"{file.path} {what}, by its key {key.text}, as control LoRAs do: that cannot come "
                "with a call. Merge it with `fluxdeploy build --lora`."
            )


def _is_first(key: Key) -> bool:
    """Whether a key is of the linear that reads a token's channels."""
    names = graph_names(key.module, key.flat) or (key.module,)
    return names == _FIRST


def _norms(file: TensorFile, keys: Iterable[Key], norms: Mapping[str, int]) -> dict[str, NewNorm]:
    """The norms that the file brings, by their names in the graphs."""
    found: dict[str, NewNorm] = {}
    for key in keys:
        if key.role != "norm":
            continue
        (name,) = graph_names(key.module) or (key.module,)
        if name not in norms:
            raise _unmatched(file, [key.text], "name no norm of this model")
        shape = file.tensors[key.text].shape
        if shape != (norms[name],):
            raise CheckpointError(
                f"{key.text} of {file.path} has shape {list(shape)}; {name} of this model has "
                f"[{norms[name]}]: it is a LoRA of another model."
            )
        if name in found:
            raise CheckpointError(
                f"{file.path} has {name} twice, as {found[name].key} and as {key.text}: keep one."
            )
        read_float32(file, key.text)
        found[name] = NewNorm(file, key.text, 0, norms[name])
    return found


def _biases(
    file: TensorFile,
    pair: _Pair,
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, int]],
    scales: Scales,
) -> dict[str, AddedBias]:
    """What one pair adds to biases, by linear."""
    key = pair.get("bias")
    if key is None:
        return {}
    shape, rows = file.tensors[key.text].shape, sum(shapes[name][0] for name in names)
    if shape != (rows,):
        raise CheckpointError(
            f"{key.text} of {file.path} has shape {list(shape)}; the bias of {' + '.join(names)} "
            f"of this model has [{rows}]."
        )
    if not read_float32(file, key.text).any():
        return {}
    down = pair["down"]
    scale = scales.of(pair.get("alpha"), down, file.tensors[down.text].shape[0])
    added, start = {}, 0
    for name in names:
        stop = start + shapes[name][0]
        added[name] = AddedBias(file, key.text, start, stop, scale)
        start = stop
    return added


def _reads(
    file: TensorFile, changes: Mapping[str, Mapping[str, LowRank]], linears: Linears
) -> int | None:
    """The channels of a token that the file takes, where they are more than the base's."""
    first = changes.get("transformer", {}).get(_FIRST[0])
    if first is None or first.width == linears["transformer"][_FIRST[0]][1]:
        return None
    return first.width


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
    width = max(file.tensors[down.text].shape[1], shapes[names[0]][1])
    changes: dict[str, LowRank] = {}
    start = 0
    for name in names:
        stop = start + shapes[name][0]
        columns = np.flatnonzero(values[start:stop].any(axis=0))
        changes[name] = LowRank(
            file, down.text, up.text, start, stop, tuple(columns.tolist()), scale, width
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
    # A text-to-image LoRA changes the latents' channels alone, a control LoRA adds channels.
    latents = shapes.get("proj_out", (width, 0))[0]
    free = names == _FIRST and (first[1] == latents or first[1] > width)
    if second[0] != rows or (first[1] != width and not free):
        raise CheckpointError(
            f"{have}, which change a linear of [{second[0]}, {first[1]}]; {' + '.join(names)} of "
            f"this model is [{rows}, {width}]. It is a LoRA of another model."
        )
    return first[0]


def _same(one: LowRank, other: LowRank) -> bool:
    """Whether two changes are equal: some files hold all their LoRA under two sets of names."""
    return (
        one.scale == other.scale
        and np.array_equal(one.down(), other.down())
        and np.array_equal(one.up(), other.up())
    )
