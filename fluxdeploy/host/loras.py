"""The LoRAs of a call: files become what the low-rank side paths of a bundle's linears read."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engines.base import Array, Engine
from fluxdeploy.arguments import check_number, check_path, shown
from fluxdeploy.bundle.files import disk_errors, sha256_file
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.side_paths import DOWN, RANK, UP, SidePath, find_side_paths, kind_of
from fluxdeploy.errors import CheckpointError, UsageError
from fluxdeploy.lora import Linears, Lora, LoraFile, LowRank, read_lora

__all__ = ["Loras", "SideInputs", "check_loras", "describe_loras", "lora_sha256"]

_MAX_SCALE = 1e6

_KEPT = 1 << 30
"""Bytes of LoRAs that are kept for later calls: three of FLUX.1's of rank 16, of all linears."""

_ENCODERS = {"clip": "CLIP", "t5": "T5"}

_Files = tuple[LoraFile, ...]
_Weighted = tuple[LowRank, float]


@dataclass(frozen=True)
class SideInputs:
    """What a call's LoRAs are to the side paths of a bundle.

    matrices: for each component that they change, all inputs of its side paths, float32.
    notices: what of them is left out, a sentence each.
    """

    matrices: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all matrices."""
        return sum(array.nbytes for inputs in self.matrices.values() for array in inputs.values())

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each component that they change."""
        return {
            component: next(a.shape[2] for n, a in inputs.items() if n.startswith(DOWN))
            for component, inputs in self.matrices.items()
        }

    def of(self, engine: Engine) -> dict[str, Array]:
        """The inputs of an engine's side paths: zeros of rank 1 where no LoRA changes it."""
        held = self.matrices.get(engine.component, {})
        shapes = {spec.name: spec.shape for spec in engine.inputs}
        return {
            name: held.get(name, zeros)
            for name, zeros in _zeros(find_side_paths(shapes), 1).items()
        }


class Loras:
    """Reads LoRA files for a bundle, and keeps what the latest calls had, up to `capacity` bytes.

    A file that was changed since is read again. May be called from several threads.
    """

    def __init__(self, manifest: Manifest, capacity: int = _KEPT) -> None:
        self._rank = manifest.lora_rank
        self._paths = {
            name: find_side_paths({spec.name: spec.shape for spec in record.inputs})
            for name, record in manifest.components.items()
        }
        self._capacity = capacity
        self._kept: OrderedDict[tuple[object, ...], SideInputs] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, files: _Files) -> SideInputs:
        """The LoRAs of a call, each times its strength; their ranks add up at each linear.

        Raises `UsageError` for a bundle without side paths, and for more rank than they have;
        `CheckpointError`, as `read_lora` does, for a file that is no LoRA of this model.
        """
        if not files:
            return SideInputs()
        if self._rank == 0:
            raise UsageError(
                f"This bundle takes no LoRA with a call, such as {files[0].path}. Build it with "
                "`fluxdeploy build --lora-rank R`, for LoRAs of ranks up to R; or merge the LoRA "
                "into it with `fluxdeploy build --lora`."
            )
        key = tuple((*_identity(file.path), file.strength) for file in files)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._load(files)
                while len(self._kept) > 1 and self._bytes() > self._capacity:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def forget(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._kept.clear()

    def _bytes(self) -> int:
        return sum(each.nbytes for each in self._kept.values())

    def _load(self, files: _Files) -> SideInputs:
        linears = self._linears()
        loras = [read_lora(file.path, linears, without=tuple(_ENCODERS)) for file in files]
        changes: dict[str, list[_Weighted]] = {}
        for file, lora in zip(files, loras, strict=True):
            for linear, change in lora.changes["transformer"].items():
                changes.setdefault(linear, []).append((change, file.strength))
        self._check_rank(files, changes)
        matrices = {
            name: _fill(paths, changes)
            for name, paths in self._paths.items()
            if any(kind_of(linear)[0] in paths for linear in changes)
        }
        return SideInputs(matrices, tuple(_left_out(loras)))

    def _linears(self) -> Linears:
        """The linears that have side paths, by their names in a checkpoint."""
        return {
            "transformer": {
                path.kind.replace("*", str(row)): (path.rows, path.columns)
                for paths in self._paths.values()
                for path in paths.values()
                for row in range(path.blocks)
            }
        }

    def _check_rank(self, files: _Files, changes: Mapping[str, Sequence[_Weighted]]) -> None:
        linear = max(changes, key=lambda name: _rank(changes[name]))
        needed = _rank(changes[linear])
        if needed <= self._rank:
            return
        names = " and ".join(str(file.path) for file in files)
        raise UsageError(
            f"{names} {'needs' if len(files) == 1 else 'together need'} rank {needed}, at {linear};"
            f" this bundle's side paths have rank {self._rank}. Leave a LoRA out, or build the "
            f"bundle with `--lora-rank {needed}`."
        )


def check_loras(given: object) -> _Files:
    """The LoRA files that an argument `lora` names: a path, or a list of paths.

    A pair (path, scale) stands wherever a path does. Raises `UsageError` for anything else.
    """
    if given is None:
        return ()
    listed = isinstance(given, (list, tuple)) and not _is_pair(given)
    return tuple(map(_check_lora, given if listed else [given]))  # type: ignore[call-overload]


def lora_sha256(path: Path) -> str:
    """The SHA-256 of a file, read again where it was changed. Raises `CheckpointError`."""
    return _sha256(*_identity(path))


@functools.lru_cache(maxsize=64)
def _sha256(path: str, modified: int, size: int) -> str:
    with disk_errors("read", Path(path)):
        return sha256_file(Path(path))


def describe_loras(files: Iterable[LoraFile], sha256: Mapping[Path, str]) -> str:
    """Name, strength and SHA-256 of each file, for a picture's metadata.

    The strength is what comes after the last colon before the hash.
    """
    return ", ".join(f"{f.path.name}:{f.strength:g} {sha256[f.path]}" for f in files)


def _is_pair(given: object) -> bool:
    """Whether it is a path with its scale, and no list of two paths."""
    paths = (str, os.PathLike)
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], paths)
        and not isinstance(given[1], (*paths, tuple, list, LoraFile))
    )


def _check_lora(given: object) -> LoraFile:
    if isinstance(given, LoraFile):
        given = given.path, given.strength
    path, strength = given if isinstance(given, (list, tuple)) and len(given) == 2 else (given, 1.0)
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"`lora` has {shown(given)}; it takes a path, a pair (path, scale), or a list of these."
        )
    return LoraFile(
        check_path("lora", path), check_number("lora", strength, -_MAX_SCALE, _MAX_SCALE)
    )


def _identity(path: Path) -> tuple[str, int, int]:
    """Where a file lies, when it was written and how long it is."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror or error}. Name a .safetensors file."
        ) from error
    return os.path.realpath(path), status.st_mtime_ns, status.st_size


def _rank(changes: Iterable[_Weighted]) -> int:
    return sum(change.rank for change, _ in changes)


def _fill(
    paths: Mapping[str, SidePath], changes: Mapping[str, Sequence[_Weighted]]
) -> dict[str, Array]:
    """All inputs of a component's side paths, with the changes of its linears beside each other."""
    own = {linear: found for linear, found in changes.items() if kind_of(linear)[0] in paths}
    inputs = _zeros(paths, max(map(_rank, own.values())))
    for linear, found in own.items():
        kind, row = kind_of(linear)
        start = 0
        for change, strength in found:
            stop = start + change.rank
            inputs[DOWN + kind][row, :, start:stop] = change.down().T
            inputs[UP + kind][row, start:stop] = _scaled(change, strength)
            start = stop
    return inputs


def _scaled(change: LowRank, strength: float) -> Array:
    """The factor next to the output, transposed, times all that scales it: float32 [rank, out]."""
    with np.errstate(over="ignore"):
        up = change.up().T * np.float32(strength * change.scale)
    if not np.isfinite(up).all():
        raise UsageError(
            f"{change.file.path} times {strength:g} is past what float32 holds, at "
            f"{change.up_key}. Give it a smaller scale."
        )
    return up


def _zeros(paths: Mapping[str, SidePath], rank: int) -> dict[str, Array]:
    return {
        name: np.zeros([rank if size == RANK else int(size) for size in shape], np.float32)
        for path in paths.values()
        for name, shape in path.shapes.items()
    }


def _left_out(loras: Iterable[Lora]) -> Iterable[str]:
    """A sentence for each LoRA that changes text encoders too."""
    for lora in loras:
        if lora.left_out:
            parts = " and ".join(_ENCODERS[part] for part in lora.left_out)
            yield (
                f"`lora` leaves out what {lora.path} changes in {parts}, which have no side paths. "
                "`fluxdeploy build --lora` merges all of it."
            )
