"""GPU targets by compute capability, and which types of numbers the hardware of each has."""

from __future__ import annotations

from fluxdeploy.precision import PRECISIONS

__all__ = ["GENERATIONS", "hardware_problem", "in_words"]

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
"""The NVIDIA GPUs that engines are built for, oldest first, and their generation's name."""

_BEFORE_FP8 = ("sm75", "sm80", "sm86")
_WITH_FP4 = ("sm120", "sm121")


def in_words(target: str) -> str:
    """A target with its generation, such as `sm89 (Ada)`."""
    return f"{target} ({GENERATIONS.get(target, 'unknown')})"


def hardware_problem(target: str, precision: str) -> str | None:
    """Why the hardware of `target` cannot compute in `precision`, or None where it can."""
    quantization = PRECISIONS[precision].quantization
    if quantization is None:
        if precision == "bf16" and target == "sm75":
            return f"{in_words(target)} has no bfloat16, which starts with sm80; use fp16"
        return None
    if quantization.format == "fp8" and target in _BEFORE_FP8:
        instead = "fp16 or int8" if target == "sm75" else "int8 or bf16"
        return f"{in_words(target)} has no FP8, which starts with sm89; use {instead}"
    if quantization.format == "int4" and target == "sm75":
        return f"{in_words(target)} has no INT4 here, which starts with sm80; use int8-weights"
    if quantization.format == "nvfp4" and target not in _WITH_FP4:
        instead = "int8" if target in _BEFORE_FP8 else "fp8"
        only = ", ".join(_WITH_FP4)
        return f"{in_words(target)} has no FP4 here, which is for {only}; use {instead}"
    return None
