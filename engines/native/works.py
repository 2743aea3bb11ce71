"""The launches of a plan: which steps one kernel does, and which kernel that is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from engines.native.plan import (
    Attention,
    Convert,
    Kind,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
    Step,
    typed,
)
from engines.native.sizes import SHARED
from engines.native.specs import (
    PARAMETERS,
    Kernel,
    KernelSpec,
    convert_spec,
    linear_spec,
    norm_spec,
    rope_spec,
)
from engines.native.tiles import choose_tiles
from fluxdeploy.bundle.typed_json import load_strict
from fluxdeploy.errors import EngineError

__all__ = ["Launchable", "Work", "read_works", "schedule", "works_metadata"]


@dataclass(frozen=True)
class Work:
    """Steps that are one launch, and what it is compiled from.

    None for attention, which is cuDNN's. A linear may have two, as a `Launchable` has.
    """

    steps: tuple[Step, ...]
    specs: tuple[KernelSpec, ...]


def schedule(plan: Plan) -> list[Work]:
    """The steps of a plan with their kernels; what one kernel does together is one work.

    That is a linear that makes Q, K and V, with their norms and RoPE, where that is faster: it then
    rounds once, and Q, K and V are not read again before attention.
    """
    works: list[Work] = []
    steps = list(plan.steps)
    while steps:
        step = steps.pop(0)
        if isinstance(step, Linear):
            turn = steps[0] if steps and isinstance(steps[0], Rope) else None
            if turn is None or not _turns(plan, step, turn):
                works.append(Work((step,), _linears(plan, step, None)))
            else:
                works.append(Work((step, steps.pop(0)), _linears(plan, step, turn)))
        else:
            spec = _spec_of(plan, step)
            works.append(Work((step,), () if spec is None else (spec,)))
    return works


@dataclass(frozen=True)
class Launchable:
    """Steps that are one launch, and its compiled kernels.

    None for attention; or one; or of a linear one for up to `FEW_ROWS` rows, and another for more.
    """

    steps: tuple[Step, ...]
    kernels: tuple[Kernel, ...]


_WORKS, _KERNELS, _PARAMETERS = "works", "kernels", "parameters"
_Written = tuple[tuple[int, tuple[str, ...]], ...]
"""How many steps a launch does, and the names of its kernels."""


def works_metadata(plan: Plan, kernels: Mapping[str, Kernel]) -> dict[str, str]:
    """What an engine's file says of its launches, for `read_works`; kernels go by `spec.name`."""
    works = [[len(work.steps), [spec.name for spec in work.specs]] for work in schedule(plan)]
    facts = {name: asdict(kernel) for name, kernel in kernels.items()}
    return {
        _WORKS: json.dumps(works),
        _KERNELS: json.dumps(facts),
        _PARAMETERS: _parameters_digest(),
    }


def _parameters_digest() -> str:
    """Of what kernels are given: one that is given something else computes anything."""
    text = json.dumps([[name, list(kinds.items())] for name, kinds in PARAMETERS.items()])
    return hashlib.sha256(text.encode()).hexdigest()


def read_works(plan: Plan, metadata: Mapping[str, str]) -> list[Launchable]:
    """The launches that `works_metadata` wrote down.

    The tiles of an engine are those that it was built with, whatever is chosen today. Raises
    `EngineError` for anything else.
    """
    if metadata.get(_PARAMETERS) != _parameters_digest():
        raise EngineError("The engine's kernels are of another version. Build it again.")
    try:
        facts = typed(dict[str, Kernel], load_strict(metadata[_KERNELS]), _KERNELS)
        asked = typed(_Written, load_strict(metadata[_WORKS]), _WORKS)
        works, start = [], 0
        for index, (count, names) in enumerate(asked):
            steps = plan.steps[start : start + count] if count > 0 else ()
            start += count
            works.append(Launchable(steps, tuple(facts[name] for name in names)))
            if not _fits(works[-1]):
                raise ValueError(f"number {index}")
        if start != len(plan.steps):
            raise ValueError(f"{start} steps of {len(plan.steps)}")
    except (KeyError, ValueError) as error:
        raise EngineError(f"The engine's launches are broken: {error}. Build it again.") from error
    return works


_FUNCTIONS: Mapping[type[Step], tuple[str, ...]] = {
    Attention: (),
    Convert: ("convert",),
    Linear: ("linear", "specialized"),
    Norm: ("norm",),
    Rope: ("rope",),
}


def _fits(work: Launchable) -> bool:
    """Whether the kernels are for these steps, and their facts such as a GPU can have."""
    if not work.steps:
        return False
    first, *others = work.steps
    functions = _FUNCTIONS[type(first)]
    if others:
        turns = isinstance(first, Linear) and [type(step) for step in others] == [Rope]
        functions = ("specialized",) if turns else ()
    counts = range(1, 3) if isinstance(first, Linear) else range(1, 2) if functions else range(1)
    return len(work.kernels) in counts and all(
        kernel.function in functions
        and 32 <= kernel.threads <= 1024
        and 0 <= kernel.shared <= SHARED
        and 1 <= kernel.programs <= 8
        and len(kernel.boxes) == (4 if isinstance(first, Linear) else 0)
        and all(1 <= side <= 256 for box in kernel.boxes for side in (box.rows, box.columns))
        and all(1 <= side <= 256 for side in kernel.tile)
        for kernel in work.kernels
    )


def _spec_of(plan: Plan, step: Convert | Norm | Rope | Attention) -> KernelSpec | None:
    if isinstance(step, Attention):
        return None
    x, out = plan.buffer(step.x.buffer), plan.buffer(step.out.buffer)
    if isinstance(step, Convert):
        return convert_spec(x.kind, out.kind, step.columns, x.columns, out.columns)
    if isinstance(step, Norm):
        return norm_spec(out.kind, plan.width, out.columns)
    return rope_spec(out.kind, plan.width, plan.head_dim)


def _turns(plan: Plan, step: Linear, turn: Rope) -> bool:
    """Whether a linear does `turn` too.

    In bfloat16, and where no MLP follows Q, K and V, the product alone gains more.
    """
    kind = plan.buffer(step.x.buffer).kind
    tiles = choose_tiles(kind, step.columns, step.inner, step.epilogue, step.split)
    return (
        step.epilogue == "split"
        and kind == "fp8"
        and turn.x == step.out
        and all(tile.turns(plan.head_dim) for tile in tiles)
    )


def _linears(plan: Plan, step: Linear, turn: Rope | None) -> tuple[KernelSpec, ...]:
    """The kernels of a linear, for few rows and for many; they do `turn` too where it is given."""

    def kind(place: Place | None) -> Kind:
        return plan.buffer((place or step.out).buffer).kind

    out = kind(step.out) if turn is None else plan.buffer(turn.out.buffer).kind
    tiles = choose_tiles(kind(step.x), step.columns, step.inner, step.epilogue, step.split)
    return tuple(
        linear_spec(
            kind(step.x),
            out,
            kind(step.second) if step.second is not None else out,
            step.columns,
            step.inner,
            step.epilogue,
            split=step.split,
            grouped=step.grouped,
            scaled=step.scale is not None,
            turn=turn is not None,
            tile=tile,
        )
        for tile in tiles
    )
