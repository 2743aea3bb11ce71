"""What a native engine's steps are, as a build tells of them, and what is wider than was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engines.base import EngineSource
from engines.native.plan import Attention, Convert, Linear, Norm, Packed, Plan, Rope, Step
from engines.native.sizes import SPLIT
from fluxdeploy.errors import EngineError

__all__ = ["check_shape", "describe", "find_widened"]

_ALIGNED = 16
"""What channels are multiples of: in 8 bits, a GPU's copies are of 16 bytes."""
_NAMED = 4


def check_shape(plan: Plan, component: str) -> None:
    """Raise `EngineError` where the kernels have no such sizes; others are refused by a plan."""
    for step in plan.steps:
        if not isinstance(step, Linear):
            continue
        for what, columns, multiple in (
            ("channels in", step.inner, _ALIGNED),
            ("channels out", step.columns, _ALIGNED),
            ("channels of Q, K and V", step.split, SPLIT),
        ):
            if columns % multiple:
                raise EngineError(
                    f"native cannot build {component}: {step.weight} has {columns} {what}, and the "
                    f"kernels are for multiples of {multiple}. Use --runtime onnxruntime."
                )


def describe(plan: Plan, widened: str | None) -> str:
    """The steps as JSON text, and what is wider than the precision asks, None where nothing is."""
    packed = {tensor.name: tensor for tensor in plan.packed}
    steps = [_described(step, plan, packed) for step in plan.steps]
    return json.dumps({"widened": widened, "steps": steps}, indent=1) + "\n"


def _described(step: Step, plan: Plan, packed: Mapping[str, Packed]) -> dict[str, Any]:
    """What it does, on which tokens and how wide, and the types that go in and out."""
    rows = getattr(step, "rows", "all")
    kinds = [plan.buffer(step.x.buffer).kind, plan.buffer(step.out.buffer).kind]
    shape: list[int]
    if isinstance(step, Linear):
        what = f"linear, {step.epilogue}"
        shape = [step.inner, step.columns]
    elif isinstance(step, Convert):
        what, shape = "convert", [step.columns]
    elif isinstance(step, Norm):
        what, shape = "norm", [plan.width]
    elif isinstance(step, Rope):
        what, shape = "rope", [plan.heads, plan.head_dim]
    else:
        what, shape = "attention", [plan.heads, plan.head_dim]
    found = {"what": what, "rows": rows, "shape": shape, "type": kinds[0], "out": kinds[1]}
    if isinstance(step, Linear):
        found["weights"] = [part.source for part in packed[step.weight].parts]
    return found


def find_widened(plan: Plan, source: EngineSource) -> str | None:
    """What is in 16 bits though the precision quantizes it, in words; None where nothing is.

    Steps that share an input or a launch have one type: where a recipe spares one of them, the
    others are widened too.
    """
    quantization = source.precision.quantization
    if quantization is None:
        return None
    problems = []
    # Linears that are to have narrow weights alone are widened in any case.
    wide = sorted(_wide_linears(plan))
    if len(wide) > source.weights_only:
        problems.append(
            f"{len(wide) - source.weights_only} more linears run in bf16 than were "
            f"spared: of {_named(wide)}"
        )
    if quantization.attention:
        kinds = [plan.buffer(s.x.buffer).kind for s in plan.steps if isinstance(s, Attention)]
        more = len(kinds) - kinds.count("fp8") - source.wide_attentions
        if more > 0:
            problems.append(f"{more} more attentions run in bf16 than were spared")
    return "; ".join(problems) or None


def _wide_linears(plan: Plan) -> Iterator[str]:
    """The weights in 8 bits whose packed tensor has 16."""
    weights = {step.weight for step in plan.steps if isinstance(step, Linear)}
    for tensor in plan.packed:
        if tensor.name in weights and tensor.kind != "fp8":
            yield from (part.source for part in tensor.parts if part.scale is not None)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
