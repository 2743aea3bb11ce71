"""Bundles for several runtimes: which are built together, and which edition a machine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from engines.base import Runtime
from engines.processor import choose_on_cpu
from engines.registry import (
    AUTO,
    CPU,
    EMULATE,
    choose_runtime,
    runs_here,
    runtimes,
    why_not_here,
)
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.machine import describe_cpu

if TYPE_CHECKING:
    from fluxdeploy.bundle import Bundle
    from fluxdeploy.bundle.manifest import Manifest

_NOTHING: Mapping[str, str] = {}

__all__ = ["choose_edition", "choose_runtimes", "edition_runs_here"]

Choose = Callable[
    [str, Sequence[str], "str | None", Mapping[str, str]], tuple[Runtime, tuple[str, ...]]
]


def choose_runtimes(
    names: Sequence[str] = (AUTO,),
    targets: Sequence[str] = (),
    precision: str | None = None,
    component_precision: Mapping[str, str] = _NOTHING,
    choose: Choose = choose_runtime,
) -> tuple[tuple[Runtime, tuple[str, ...]], ...]:
    """The runtimes of a bundle's editions, in order, each with its targets.

    Of the targets each of several runtimes has those that it knows, and without targets the best
    one here. `auto` is one runtime where one has all of them, and else the best one for each.
    Precisions are as `choose_runtime` takes them, and `choose` is that or `choose_builder`. Raises
    what that does, and `UsageError` for names and targets that do not go together.
    """

    def pick(name: str, own: Sequence[str]) -> tuple[Runtime, tuple[str, ...]]:
        return choose(name, tuple(own), precision, component_precision)

    unique, wanted = tuple(dict.fromkeys(names)), tuple(dict.fromkeys(targets))
    if len(unique) == 1:
        (name,) = unique
        if name != AUTO or not wanted or _one_has(wanted):
            return (pick(name, wanted),)
        groups: dict[str, list[str]] = {}
        for target in wanted:
            runtime, _ = pick(AUTO, (target,))
            groups.setdefault(runtime.name, []).append(target)
        return tuple(pick(name, own) for name, own in groups.items())
    if AUTO in unique:
        raise UsageError(f"--runtime {AUTO} chooses by itself: give it alone, or name each one.")
    known = {name: runtimes(name)[0].targets for name in unique}
    for target in wanted:
        if all(target not in own for own in known.values()):
            allowed = "; ".join(f"{name} has {', '.join(own)}" for name, own in known.items())
            raise UsageError(f"None of the runtimes named has the target {target}: {allowed}.")
    for name, own in known.items():
        if wanted and not set(wanted) & set(own):
            raise UsageError(
                f"--runtime {name} has none of the targets {', '.join(wanted)}: it has "
                f"{', '.join(own)}. Add a --target of it, or leave it out."
            )
    return tuple(
        pick(name, [target for target in wanted if target in own]) for name, own in known.items()
    )


def _suited(editions: Sequence[Bundle]) -> Bundle:
    """The first of editions that run here, or the one that suits this processor better.

    That is asked of editions for a CPU in one precision, where float32 stands for what a runtime
    has not.
    """
    first = editions[0].manifest.components["transformer"]
    for other in editions[1:]:
        record = other.manifest.components["transformer"]
        on_cpu = first.engines[0].target == record.engines[0].target == CPU
        if on_cpu and first.precision in ("fp32", record.precision):
            names = [each.manifest.runtime for each in (editions[0], other)]
            sets = describe_cpu()["instruction_sets"]
            if choose_on_cpu(sets, names, names, record.precision).runtime == names[1]:
                return other
    return editions[0]


def _one_has(targets: Sequence[str]) -> bool:
    return any(set(targets) <= set(runtime.targets) for runtime in runtimes())


def edition_runs_here(edition: Manifest) -> bool:
    """Whether this machine runs what an edition has for each of its components."""
    return runs_here(record.engines for record in edition.components.values())


def choose_edition(bundle: Bundle, runtime: str = AUTO) -> Bundle:
    """The edition that `runtime` runs, as a bundle that has no other.

    `auto` takes that of the best runtime that can run here, where on a CPU the processor decides as
    it does for a build (`choose_for_cpu`), and `emulate`, which is for what does not run here, the
    first that does not, or the first of all. A bundle with one edition is that one, whatever the
    runtime: opening its engines tells what is missing.

    Raises `EngineError` where it has no edition for the runtime, or none that runs here, and
    `UsageError` for an unknown runtime.
    """
    candidates = runtimes(runtime)
    if not bundle.manifest.editions:
        return bundle
    editions = {each.manifest.runtime: each for each in bundle.editions}
    if runtime == EMULATE:
        others = [each for each in editions.values() if not edition_runs_here(each.manifest)]
        return (others or list(editions.values()))[0]
    if runtime in editions:
        return editions[runtime]
    if runtime != AUTO:
        raise EngineError(
            f"The bundle {bundle.root} has no edition for --runtime {runtime}; it has editions for "
            f"{', '.join(editions)}."
        )
    here = [
        editions[candidate.name]
        for candidate in candidates
        if candidate.name in editions and edition_runs_here(editions[candidate.name].manifest)
    ]
    if here:
        return _suited(here)
    records = [each.manifest.components["transformer"] for each in editions.values()]
    engines = [engine for record in records for engine in record.engines]
    raise EngineError(
        f"No edition of the bundle {bundle.root} runs here. {why_not_here(engines)}. To look at "
        f"its pictures on this machine all the same: --runtime {EMULATE}."
    )
