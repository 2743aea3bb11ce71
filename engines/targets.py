"""GPU targets by compute capability, and which precisions each can have."""

from __future__ import annotations

from fluxdeploy.errors import UsageError

__all__ = ["GENERATIONS", "check_precision_targets", "precision_problem"]

GENERATIONS = {
    "sm75": "Turing",
    "sm80": "Ampere",
    "sm86": "Ampere",
    "sm89": "Ada",
    "sm90": "Hopper",
    "sm100": "Blackwell",
    "sm103": "Blackwell",
    "sm120": "Blackwell",
    "sm121": "Blackwell",
}
"""The targets of TensorRT and TensorRT-RTX, oldest first, and their generation's name."""

_BEFORE_FP8 = ("sm75", "sm80", "sm86")
_WITH_FP4 = ("sm120", "sm121")


def precision_problem(precision: str, target: str) -> str | None:
    """Why an engine for `target` cannot have `precision`, or None where it can.

    The limits are the hardware's, but for two. int8-dynamic is in operators that TensorRT does not
    read, and TensorRT-RTX has no float32 products for Turing, so that float16 is all there is.
    """
    if precision == "int8-dynamic":
        return "int8-dynamic is for ONNX Runtime on CPUs; use int8 on GPUs"
    generation = f"{target} ({GENERATIONS.get(target, 'unknown')})"
    family = precision.partition("-")[0]
    if family == "fp8" and target in _BEFORE_FP8:
        instead = "fp16 or int8" if target == "sm75" else "int8 or bf16"
        return f"{generation} has no FP8, which starts with sm89; use {instead}"
    if family == "fp4" and target not in _WITH_FP4:
        instead = "int8" if target in _BEFORE_FP8 else "fp8"
        return f"{generation} has no FP4 here, which is for {', '.join(_WITH_FP4)}; use {instead}"
    if precision == "bf16" and target == "sm75":
        return f"{generation} has no bfloat16, which starts with sm80; use fp16"
    if precision == "fp32" and target == "sm75":
        return f"{generation} has no float32 products in TensorRT-RTX; use fp16"
    return None


def check_precision_targets(component: str, precision: str, targets: tuple[str, ...]) -> None:
    """Raise `UsageError` for the first target that cannot have `precision`."""
    for target in targets:
        problem = precision_problem(precision, target)
        if problem is not None:
            raise UsageError(f"{component} cannot be {precision}: {problem}.")
