"""What a plan says in words: what cannot be, what is too small, and what a user should know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engines import AUTO, choose_builder, choose_for_cpu, edition_runs_here, runs_here
from fluxdeploy.build.checkpoint import find_text_remarks
from fluxdeploy.build.plan.figures import DiskPlan, Phase, RunMemory
from fluxdeploy.build.resolve import BuildSpec
from fluxdeploy.build.staging import find_manifest
from fluxdeploy.errors import EngineError
from fluxdeploy.machine import Memory

__all__ = ["find_impossible", "find_remarks", "find_shortages", "in_gib"]


def find_impossible(spec: BuildSpec, destination: Path, runs_beside: bool = False) -> Iterator[str]:
    """What a target has not, each once, with the components that would need it; and what a bundle
    at `destination` is kept from.

    runs_beside: whether another edition of what is built runs on this machine.
    """
    runtime, targets = spec.runtime, spec.targets
    names: dict[str, list[str]] = {}
    for component in spec.components:
        for target in component.targets:
            # What an engine computes in is one for all its targets, the first one's.
            for needed in (component.precision, component.compute):
                problem = component.runtime.precision_problem(target, needed)
                if problem is not None:
                    names.setdefault(problem, []).append(component.name)
                    break
    for problem, who in names.items():
        yield f"{', '.join(who)}: {problem}"
    network = spec.checkpoint.transformer
    problem = runtime.size_problem(network.width, network.head_dim)
    if problem is not None:
        yield f"transformer: {problem}"
    if len(targets) > 1 and not runtime.builds:
        yield f"{runtime.name} takes one --target, not {', '.join(targets)}"
    try:
        request = spec.request
        choose_builder(
            runtime.name, targets, request.transformer_precision, request.component_precision
        )
    except EngineError as error:
        yield str(error).rstrip(".")
    if not (spec.request.replace or runs_beside) and _would_stop_running(spec, destination):
        yield (
            f"{destination} holds a bundle that runs on this machine, and one for {runtime.name} "
            f"on {', '.join(targets)} would not: choose another --out, or add --replace"
        )


def _would_stop_running(spec: BuildSpec, destination: Path) -> bool:
    if runs_here(component.engines for component in spec.components):
        return False
    earlier = find_manifest(destination)
    return earlier is not None and any(edition_runs_here(each) for each in earlier.each())


def find_shortages(
    disk: DiskPlan, reusable: int, build: tuple[Phase, ...], memory: Memory, destination: Path
) -> tuple[list[str], list[str]]:
    """What is too small for the build, and what may be.

    reusable: bytes of an earlier bundle at `destination` that will probably be taken over.
    """
    shortages, warnings = [], []
    if disk.needed > disk.free:
        lack = (
            f"the build writes {in_gib(disk.needed)} to the disk of {destination}, and "
            f"{in_gib(disk.free)} are free"
        )
        if disk.needed - reusable > disk.free:
            shortages.append(f"{lack}: free some space, or choose another --out")
        else:
            warnings.append(f"{lack}: it fits only where the earlier bundle there is reused")
    free, total = memory.available, memory.with_swap
    for phase in build:
        if free is None or phase.bytes <= free:
            continue
        needs = (
            f"{in_gib(phase.bytes)} of memory for {phase.component} ({phase.name}), and "
            f"{in_gib(free)} are free"
        )
        if phase.name == "check":
            warnings.append(
                f"not every engine will be checked: that needs {needs}; run `fluxdeploy verify` "
                "where it fits"
            )
        elif total is not None and phase.bytes > total:
            shortages.append(f"the build needs {needs}: build on a machine with more memory")
        else:
            warnings.append(f"the build needs {needs}: close other programs first")
    return shortages, warnings


def find_remarks(spec: BuildSpec, usual: RunMemory, free: int | None) -> Iterator[str]:
    """What a user should know of the checkpoint, and of engines that will be built.

    usual: what a picture of the usual size takes. free: bytes of memory, None where unknown.
    """
    request = spec.request
    if request.runtimes == (AUTO,) and spec.targets == ("cpu",):
        choice = choose_for_cpu(request.transformer_precision, request.component_precision)
        if choice is not None and choice.reason:
            yield choice.reason
    yield from spec.checkpoint.notices
    yield from find_text_remarks(spec.checkpoint, spec.tokenizers)
    devices = {(c.runtime.name, target): c.runtime for c in spec.components for target in c.targets}
    told: dict[tuple[str, str], list[str]] = {}
    for (name, target), runtime in devices.items():
        running = runtime.availability(target)
        if runtime.can_build(target).ok and not running.ok:
            told.setdefault((name, running.detail), []).append(target)
    for (name, why), unusable in told.items():
        yield f"{name} engines for {', '.join(unusable)} will not be checked here: {why}"
    emulated = [c.name for c in spec.components if c.runtime.emulates(c.targets[0], c.precision)]
    if emulated:
        yield (
            f"{', '.join(emulated)}: a CPU has no FP8; it is emulated, with the same numbers "
            "and neither faster nor smaller in memory"
        )
    if spec.targets[0] == "cpu" and free is not None and usual.all_open > free:
        fits = usual.low_vram <= free
        advice = "run it with --low-vram" if fits else "even --low-vram is too much"
        yield (
            f"a picture of the usual size takes {in_gib(usual.all_open)} of memory, "
            f"{in_gib(usual.low_vram)} with --low-vram, and {in_gib(free)} are free: {advice}"
        )


def in_gib(size: int) -> str:
    """A size in words, in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
