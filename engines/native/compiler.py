"""One kernel from its source to a cubin for Hopper, with Triton.

    python -m engines.native.compiler FOLDER

reads a list of `KernelSpec` as JSON, writes cubins into FOLDER by the kernels' names, and prints a
line of JSON for each: what is known of the kernel, or why there is none. `engines.native.compile`
starts it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.native.plan import BYTES, Kind
from engines.native.sizes import SHARED
from engines.native.specs import PARAMETERS, Kernel, KernelSpec, TensorBox
from fluxdeploy.errors import EngineError, MissingDependencyError
from fluxdeploy.install import install_command

__all__ = ["compile_spec"]

_TYPES = {"f32": "fp32", "bf16": "bf16", "fp8": "fp8e4nv"}
_CAPABILITY = 90


def compile_spec(spec: KernelSpec) -> tuple[Kernel, bytes]:
    """One kernel and its cubin. Raises `EngineError` where the compiler refuses."""
    try:
        import triton  # noqa: F401 - before what it is needed for, which may fail to import too
    except ImportError as error:
        raise MissingDependencyError(
            f"Triton cannot be imported ({error}), which compiles kernels: "
            f"{install_command('native')}."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = _compile(spec)
    except Exception as error:
        raise EngineError(
            f"Triton does not compile {spec.function} for sm{_CAPABILITY}: {error}."
        ) from error
    facts = compiled.metadata
    if facts.shared > SHARED:
        raise EngineError(
            f"The kernel {spec.function} ({dict(spec.constants)}) needs {facts.shared} bytes of "
            f"shared memory, and sm{_CAPABILITY} has {SHARED}."
        )
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise EngineError(f"The kernel {spec.function} wants scratch memory, which it has not.")
    boxes = []
    for meta in facts.tensordesc_meta:
        high, wide = meta["block_size"]
        boxes.append(TensorBox(high, wide, meta["swizzle"]))
    constants = spec.constants
    tile = (int(constants.get("TILE_ROWS", 1)), int(constants.get("TILE_COLUMNS", 1)))
    kernel = Kernel(
        spec.name,
        spec.function,
        facts.name,
        32 * facts.num_warps,
        facts.shared,
        tuple(boxes),
        tile,
        spec.programs,
    )
    return kernel, compiled.asm["cubin"]


def _compile(spec: KernelSpec) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from engines.native import kernels, linear

    gluon = spec.function in linear.__all__
    function = getattr(linear if gluon else kernels, spec.function)
    names = list(function.arg_names)
    signature = dict(_signature(spec, gluon)) | dict.fromkeys(spec.constants, "constexpr")
    # Addresses and rows are multiples of 16 bytes, which lets loads be wide.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in PARAMETERS[spec.function].items()
        if kind == "pointer"
    }
    source = (GluonASTSource if gluon else ASTSource)(
        function,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in spec.constants.items()},
        aligned,
    )
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    return triton.compile(source, target=GPUTarget("cuda", _CAPABILITY, 32), options=options)


def _signature(spec: KernelSpec, gluon: bool) -> Iterable[tuple[str, str]]:
    boxes = spec.boxes or {}
    for name, kind in PARAMETERS[spec.function].items():
        if kind == "pointer":
            yield name, f"*{_TYPES[spec.types[name]]}"
        elif kind == "box":
            layout = _layout(spec.types[name], boxes[name]) if gluon else ""
            yield name, f"tensordesc<{_TYPES[spec.types[name]]}{list(boxes[name])}{layout}>"
        else:
            yield name, kind


def _layout(kind: Kind, box: tuple[int, int]) -> str:
    """How a box lies in shared memory, which Gluon's types of tensors say."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    size = BYTES[kind]
    return f", {NVMMASharedLayout(min(128, box[1] * size), 8 * size)!r}"


def _main(folder: str) -> None:
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for found in json.load(sys.stdin):
            answers.write(json.dumps(_answer(KernelSpec(**found), Path(folder))) + "\n")
            answers.flush()


def _answer(spec: KernelSpec, folder: Path) -> dict[str, Any]:
    try:
        kernel, cubin = compile_spec(spec)
        (folder / kernel.name).write_bytes(cubin)
    except MissingDependencyError as error:
        return {"missing": str(error)}
    except EngineError as error:
        return {"failure": str(error)}
    except OSError as error:
        return {"failure": f"The kernel {spec.function} cannot be written: {error}."}
    return asdict(kernel)


if __name__ == "__main__":
    _main(*sys.argv[1:])
