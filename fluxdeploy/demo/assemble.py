"""A checkpoint of `demo:dev` and what a task changes of its transformer, as an ordinary folder.

A difference holds low ranks, `NAME.lora_A.weight` [rank, in] and `NAME.lora_B.weight` [out, rank],
to be added to `NAME.weight` as B @ A, and tensors that take the place of those of their names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fluxdeploy.bundle.tensorfile import (
    TensorFile,
    TensorFileWriter,
    from_float32,
    read_header,
    read_tensor,
    to_float32,
)

__all__ = ["assemble"]

Array = NDArray[Any]

_DIFFERENCE = "difference.safetensors"
_WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def assemble(base: Path, task: Path, folder: Path) -> None:
    """Write the checkpoint `folder` in diffusers layout, which must not be there yet.

    base: the checkpoint that the task was trained over. task: a folder with the checkpoint's own
    model_index.json and transformer/config.json, and difference.safetensors. Raises
    `CheckpointError` for tensors that do not fit and `BundleError` where the disk refuses.
    """
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(task, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_DIFFERENCE))
    before = read_header(base / _WEIGHTS)
    tensors = dict(_merged(before, read_header(task / _DIFFERENCE)))
    declared = [(name, "BF16", values.shape) for name, values in tensors.items()]
    with TensorFileWriter(folder / _WEIGHTS, declared, {"format": "pt"}) as file:
        for values in tensors.values():
            file.write(from_float32(values, "BF16"))


def _merged(base: TensorFile, difference: TensorFile) -> Mapping[str, Array]:
    merged = {}
    for name in base.tensors:
        if name in difference.tensors:
            merged[name] = _read(difference, name)
            continue
        merged[name] = _read(base, name)
        linear = name.removesuffix(".weight")
        if f"{linear}.lora_A.weight" in difference.tensors and linear != name:
            down, up = (_read(difference, f"{linear}.lora_{half}.weight") for half in "AB")
            merged[name] = merged[name] + up @ down
    return merged


def _read(file: TensorFile, name: str) -> Array:
    return to_float32(read_tensor(file, name), file.tensors[name].dtype)
