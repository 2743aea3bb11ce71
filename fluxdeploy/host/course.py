"""How a call goes from noise to picture: sampler, noise levels, and steps that are skipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.arguments import check_integer, shown
from fluxdeploy.bundle.manifest import MAX_ORDER, Manifest, SkipRecord
from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.sampler import load_sampler
from fluxdeploy.sampling.schedule import MAX_STEPS
from fluxdeploy.sampling.skipping import Skips

__all__ = ["check_sigmas", "check_skip", "unmeasured"]


def check_sigmas(sigmas: object, num_inference_steps: int | None) -> NDArray[np.float32]:
    """The caller's noise levels before shifting, float32 [N]: below each other, in (0, 1].

    Raises `UsageError` for others, and where N is not the number of steps that is asked for.
    """
    try:
        levels = np.asarray(sigmas)
    except Exception:  # noqa: BLE001 - an array is anything that says it is one
        levels = np.empty(0, object)
    if levels.dtype.kind not in "iuf" or levels.ndim != 1 or not 0 < levels.size <= MAX_STEPS:
        raise UsageError(
            f"`sigmas` must be a list of noise levels, one a step, such as [1.0, 0.75, 0.5, 0.25], "
            f"not {shown(sigmas)}."
        )
    levels = levels.astype(np.float32)
    for step, level in enumerate(levels):
        if not 0 < level <= 1:
            last = " The 0 at the end is put there by itself; leave it out." if level == 0 else ""
            raise UsageError(
                f"`sigmas` has {level:g} for step {step}; noise levels are above 0, and at most 1."
                f"{last}"
            )
        if step > 0 and not level < levels[step - 1]:
            raise UsageError(
                f"`sigmas` has {level:g} for step {step}, after {levels[step - 1]:g}; each noise "
                "level must be below the one before, from noise to picture."
            )
    if num_inference_steps not in (None, levels.size):
        raise UsageError(
            f"`sigmas` has {levels.size} noise levels, and `num_inference_steps` is "
            f"{shown(num_inference_steps)}. Leave out one of them: a step has a level."
        )
    return levels


def check_skip(
    skip: object, manifest: Manifest, sampler: str, steps: int, evenly: bool
) -> Skips | None:
    """The steps that `FluxPipeline.__call__` shall skip, of `steps`; None for none.

    evenly: whether the noise levels are the schedule's, and not the caller's.

    Raises `UsageError` for steps that are none, for a sampler that takes several velocities a step,
    and for "auto" where the manifest has no record of such a call.
    """
    if isinstance(skip, str) and skip == "none":
        return None
    if load_sampler(sampler).evaluations(2) != 2:
        raise UsageError(
            f"Steps cannot be skipped with the sampler {sampler!r}, which evaluates the "
            "velocity several times a step. Leave out `skip`, or use 'euler'."
        )
    if isinstance(skip, str) and skip == "auto":
        record = recorded(manifest, sampler, steps, evenly)
        return Skips(record.steps, record.order)
    given = skip if isinstance(skip, Skips) else Skips(_listed(skip))
    order = check_integer("order of `skip`", given.order, 0, MAX_ORDER)
    found = [check_integer("a step of `skip`", step, None) for step in given.steps]
    for step in found:
        if not 0 < step < steps:
            why = " The first step has none before it to go on from." if step == 0 else ""
            raise UsageError(
                f"`skip` has the step {shown(step)}; of {steps} steps, 1 to {steps - 1} can be "
                f"skipped.{why}"
            )
    return Skips(tuple(sorted(set(found))), order) if found else None


def recorded(manifest: Manifest, sampler: str, steps: int, evenly: bool) -> SkipRecord:
    """The record of `fluxdeploy tune` for such a call. Raises `UsageError` where there is none."""
    if not evenly:
        raise UsageError(
            "`skip` cannot be 'auto' beside `sigmas`: what was measured are the bundle's own noise "
            "levels. Leave out one of them."
        )
    for record in manifest.skips:
        if (record.sampler, record.num_inference_steps) == (sampler, steps):
            return record
    known = ", ".join(f"{r.num_inference_steps} steps of {r.sampler!r}" for r in manifest.skips)
    raise UsageError(
        f"This bundle has no steps to skip for {steps} steps of {sampler!r}; it has "
        f"{f'those for {known}' if known else 'none at all'}. Find some with `fluxdeploy tune`, or "
        "leave out `skip`."
    )


def unmeasured(
    manifest: Manifest, sampler: str, steps: int, height: int, width: int
) -> tuple[str, ...]:
    """A sentence where skips that are recorded were measured with pictures of another size."""
    record = recorded(manifest, sampler, steps, evenly=True)
    if (record.height, record.width) == (height, width):
        return ()
    return (
        f"The skipped steps were measured at {record.width}x{record.height}; what they keep of "
        f"pictures of {width}x{height} was not.",
    )


def _listed(skip: object) -> tuple[int, ...]:
    if isinstance(skip, Sequence) and not isinstance(skip, (str, bytes)):
        return tuple(skip)
    raise UsageError(
        f"`skip` must be 'none', 'auto' or a list of steps such as [3, 5, 7], not {shown(skip)}."
    )
