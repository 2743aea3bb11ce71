"""The file of a native engine: its weights, its plan, and the code that runs them, as safetensors.

The plan's tensors come first, each at a multiple of 256 bytes, so that they go to the GPU in one
piece; then the compiled kernels. The plan is JSON in the file's metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.native.check import check_plan
from engines.native.plan import Kind, Plan
from fluxdeploy.bundle.tensorfile import TensorEntry, TensorFile, read_header, read_tensor
from fluxdeploy.errors import CheckpointError, EngineError

__all__ = ["ALIGNMENT", "CUBIN", "DTYPES", "PADDING", "PLAN", "EngineFile", "Stored", "read_engine"]

ALIGNMENT = 256
"""What every tensor's place is a multiple of, in bytes."""

CUBIN, PADDING, PLAN = "cubin.", "padding.", "plan"
"""What the names of compiled kernels and of filling begin with; the plan's key in the metadata."""

DTYPES: Mapping[Kind, str] = {"f32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}
"""The safetensors types of what a plan names."""

_KINDS: Mapping[str, Kind] = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: `offset` counts bytes from the start of the data section."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class EngineFile:
    """What an engine's file says.

    metadata: what was written beside the plan.
    tensors: those of the plan. They lie in the `data_size` bytes from `data_offset` of the file on.
    """

    path: Path
    plan: Plan
    metadata: Mapping[str, str]
    tensors: Mapping[str, Stored]
    data_offset: int
    data_size: int
    _file: TensorFile

    def cubins(self) -> dict[str, bytes]:
        """The compiled kernels by name. Raises `EngineError` for a file that was cut off."""
        names = [name for name in self._file.tensors if name.startswith(CUBIN)]
        try:
            return {
                name.removeprefix(CUBIN): read_tensor(self._file, name).tobytes() for name in names
            }
        except CheckpointError as error:
            raise _broken(self.path, str(error)) from error


def read_engine(path: str | os.PathLike[str]) -> EngineFile:
    """Read what a native engine's file says; of its data nothing is read.

    Raises `EngineError` for a file that is missing, truncated, no engine, or whose plan does not
    fit its tensors.
    """
    source = Path(path)
    try:
        file = read_header(source)
    except CheckpointError as error:
        raise _broken(source, str(error).rstrip(".")) from error
    text = file.metadata.get(PLAN)
    if text is None:
        raise _broken(source, "it has no plan")
    start = min((entry.offset for entry in file.tensors.values()), default=0)
    tensors = {}
    for name, entry in file.tensors.items():
        if not name.startswith((CUBIN, PADDING)):
            tensors[name] = _stored(source, entry, start)
        elif entry.dtype != "U8" or len(entry.shape) != 1:
            raise _broken(source, f"{name} is of {entry.dtype} {list(entry.shape)}")
    try:
        plan = Plan.from_json(text)
        check_plan(plan, {name: (each.kind, each.shape) for name, each in tensors.items()})
    except EngineError as error:
        raise _broken(source, str(error).rstrip(".")) from error
    except ValueError as error:
        raise _broken(source, f"its plan does not fit: {error}") from error
    metadata = {key: value for key, value in file.metadata.items() if key != PLAN}
    size = max((each.offset + each.nbytes for each in tensors.values()), default=0)
    return EngineFile(source, plan, metadata, tensors, start, size, file)


def _stored(path: Path, entry: TensorEntry, start: int) -> Stored:
    kind, offset = _KINDS.get(entry.dtype), entry.offset - start
    if kind is None:
        raise _broken(path, f"{entry.name} is of {entry.dtype}")
    if offset % ALIGNMENT:
        raise _broken(path, f"{entry.name} begins at byte {offset}, no multiple of {ALIGNMENT}")
    return Stored(kind, entry.shape, offset, entry.nbytes)


def _broken(path: Path, problem: str) -> EngineError:
    return EngineError(f"{path} is no engine of the native runtime: {problem}. Build it again.")
