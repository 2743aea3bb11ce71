"""What `auto` takes on a CPU: by its instructions, the precision, and the runtimes that are there.

A table and no measurement, so that the same machine gives the same bundle whatever else it does.
What decides is whether the processor multiplies in few bits, and which runtime makes use of that;
docs/performance.md has the figures.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fluxdeploy.install import install_command

__all__ = ["CpuChoice", "choose_on_cpu"]

_OPENVINO = "openvino"

_MULTIPLIES = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512"}
"""What multiplies bfloat16 on x86-64, best first, and what it is called."""

_FLOAT32 = "which ONNX Runtime would compute in float32"
_GAINS = {
    "bf16": f"{_FLOAT32}; --precision int8 is faster still",
    "int8": "and has attention in it around int8, where ONNX Runtime has float32",
    "int8-weights": _FLOAT32,
    "int4-weights": _FLOAT32,
}
"""The precisions that gain by it in OpenVINO, and how. Float32 has no other instructions there."""


@dataclass(frozen=True)
class CpuChoice:
    """A runtime by its name, and why: a sentence without its full stop, empty where the processor
    makes no difference.
    """

    runtime: str
    reason: str


def choose_on_cpu(
    instruction_sets: Collection[str],
    fit: Sequence[str],
    installed: Collection[str],
    precision: str,
) -> CpuChoice:
    """The runtime for a transformer in `precision`.

    instruction_sets: as `describe_cpu` names them. fit: the runtimes, one at least, that have all
    the precisions that are asked for, best first where the processor makes no difference.
    installed: those of them that can run here.
    """
    first = next((name for name in fit if name in installed), fit[0])
    unit = next((name for key, name in _MULTIPLIES.items() if key in instruction_sets), None)
    gain = _GAINS.get(precision)
    if unit is None or gain is None or _OPENVINO not in fit or first == _OPENVINO:
        return CpuChoice(first, "")
    multiplies = f"this processor multiplies bfloat16 ({unit})"
    if _OPENVINO in installed:
        return CpuChoice(
            _OPENVINO,
            f"OpenVINO is taken, since {multiplies}, {gain}; for machines without either, name "
            f"--runtime {first}",
        )
    install = install_command(_OPENVINO)
    return CpuChoice(
        first, f"{multiplies}: OpenVINO, which makes use of it, is not installed: {install}"
    )
