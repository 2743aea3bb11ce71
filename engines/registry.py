"""The runtimes that engines can be opened with, and the choice among them.

A runtime joins by a line in `_RUNTIMES`; hosts name it or leave the choice to `auto`. `emulate`
alone is never chosen: it is for looking at the bundles of the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

from engines.base import Engine, EngineOptions, Runtime
from engines.graph_files import check_graph
from engines.processor import CpuChoice, choose_on_cpu
from fluxdeploy.arguments import shown
from fluxdeploy.bundle.manifest import EngineRecord
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.machine import describe_cpu

if TYPE_CHECKING:
    from fluxdeploy.bundle import Bundle

__all__ = [
    "AUTO",
    "CPU",
    "EMULATE",
    "choose_builder",
    "choose_for_cpu",
    "choose_runtime",
    "choose_target",
    "open_engine",
    "runs_here",
    "runtime_names",
    "runtimes",
    "why_not_here",
]

AUTO = "auto"
EMULATE = "emulate"
CPU = "cpu"
_NOTHING: Mapping[str, str] = {}

# Best first; imported when asked for, since each brings its runtime's library.
_RUNTIMES = {
    "tensorrt": ("engines.tensorrt.runtime", "TensorRt"),
    "tensorrt-rtx": ("engines.tensorrt.runtime", "TensorRtRtx"),
    "native": ("engines.native.runtime", "Native"),
    "onnxruntime": ("engines.onnxruntime", "OnnxRuntime"),
    "openvino": ("engines.openvino", "OpenVino"),
}
_BY_NAME = {EMULATE: ("engines.emulate.runtime", "Emulate")}


def runtime_names() -> tuple[str, ...]:
    """Names of the known runtimes, best first, and of the one that `auto` never takes."""
    return (*_RUNTIMES, *_BY_NAME)


@cache
def _runtime(name: str) -> Runtime:
    module, kind = (_RUNTIMES | _BY_NAME)[name]
    runtime: Runtime = getattr(importlib.import_module(module), kind)()
    return runtime


def runtimes(name: str = AUTO) -> tuple[Runtime, ...]:
    """The runtimes to consider, best first. Raises `UsageError` for an unknown name."""
    if isinstance(name, str) and name == AUTO:
        return tuple(_runtime(known) for known in _RUNTIMES)
    if not isinstance(name, str) or name not in runtime_names():
        known = ", ".join((AUTO, *runtime_names()))
        raise UsageError(f"There is no runtime {shown(name)}; the runtimes are {known}.")
    return (_runtime(name),)


def choose_target(
    name: str = AUTO,
    precision: str | None = None,
    building: bool = False,
    component_precision: Mapping[str, str] = _NOTHING,
) -> tuple[Runtime, str]:
    """The best runtime and target that can run engines on this machine.

    In `precision`, and components that are named in theirs, if any can; with `building` one that
    can also build here, if any can. Among CPU runtimes the processor decides: `choose_for_cpu`.
    Raises `EngineError` where there is none, with each one's reason and with the targets that can
    be built for here all the same, in `precision` where that is given, and `UsageError` for an
    unknown name.
    """
    reasons: list[tuple[str, str, str]] = []
    running = []
    for runtime in runtimes(name):
        for target in runtime.targets:
            available = runtime.availability(target)
            if not available.ok:
                reasons.append((runtime.name, target, available.detail))
            elif _has_precision(runtime, (target,), precision, component_precision) and not (
                building and _build_problems(runtime, (target,))
            ):
                if name == AUTO and target == CPU and precision is not None:
                    choice = choose_for_cpu(precision, component_precision)
                    return runtime if choice is None else _runtime(choice.runtime), target
                return runtime, target
            else:
                running.append((runtime, target))
    if running:
        return running[0]
    others = _possible_elsewhere(name, precision)
    advice = f" To build for another machine, name its --target: {others}." if others else ""
    raise EngineError(f"No runtime can run engines on this machine. {_in_words(reasons)}.{advice}")


def choose_for_cpu(
    precision: str, component_precision: Mapping[str, str] = _NOTHING
) -> CpuChoice | None:
    """What `auto` takes for a build on this machine's CPU, and why.

    Of the runtimes that have the transformer's `precision` and those of the components that are
    named; None where there is none.
    """
    fit = [
        runtime
        for runtime in runtimes()
        if CPU in runtime.targets
        and _has_precision(runtime, (CPU,), precision, component_precision)
        and not _build_problems(runtime, (CPU,))
    ]
    if not fit:
        return None
    installed = [runtime.name for runtime in fit if runtime.availability(CPU).ok]
    sets = describe_cpu()["instruction_sets"]
    return choose_on_cpu(sets, [runtime.name for runtime in fit], installed, precision)


def _possible_elsewhere(name: str, precision: str | None) -> str:
    """The targets that each runtime can build for here, in words; empty where there are none."""
    possible = {
        runtime.name: [
            target
            for target in runtime.targets
            if runtime.builds
            and runtime.can_build(target).ok
            and _has_precision(runtime, (target,), precision)
        ]
        for runtime in runtimes(name)
    }
    what = "" if precision is None else f" in {precision}"
    return "; ".join(
        f"{name} builds{what} for {', '.join(targets)}"
        for name, targets in possible.items()
        if targets
    )


def _has_precision(
    runtime: Runtime,
    targets: tuple[str, ...],
    precision: str | None,
    component_precision: Mapping[str, str] = _NOTHING,
) -> bool:
    """Whether a runtime has what is asked for, or what runs a component of its bundles has."""
    asked = {} if precision is None else {"transformer": precision, **component_precision}
    for component, wanted in asked.items():
        own, devices = runtime.of(component, targets)
        if any(own.precision_problem(target, wanted) is not None for target in devices):
            return False
    return True


def choose_runtime(
    name: str = AUTO,
    targets: Sequence[str] = (),
    precision: str | None = None,
    component_precision: Mapping[str, str] = _NOTHING,
) -> tuple[Runtime, tuple[str, ...]]:
    """The best runtime that has every one of `targets`, and each of those once.

    Runtimes that can build for them here come first, but one that cannot, or is not installed,
    is better than none: see `choose_builder`. Without targets, what `choose_target` takes; for a
    CPU, what `choose_for_cpu` does.

    Raises `UsageError` where no runtime has the targets, or the name is unknown or that of the
    emulation, and without targets what `choose_target` does.
    """
    if name in _BY_NAME:
        raise UsageError(
            f"No bundle is built for --runtime {name}, which runs the numbers of any bundle on a "
            "CPU, with `generate` and `verify`: name the runtime that it is to be deployed with."
        )
    if not targets:
        runtime, target = choose_target(name, precision, True, component_precision)
        return runtime, (target,)
    unique = tuple(dict.fromkeys(targets))
    known = _runtimes_with(unique, name)
    if name == AUTO and unique == (CPU,) and precision is not None:
        choice = choose_for_cpu(precision, component_precision)
        if choice is not None:
            return _runtime(choice.runtime), unique
    fit = [r for r in known if _has_precision(r, unique, precision, component_precision)] or known
    return next((r for r in fit if not _build_problems(r, unique)), fit[0]), unique


def choose_builder(
    name: str = AUTO,
    targets: Sequence[str] = (),
    precision: str | None = None,
    component_precision: Mapping[str, str] = _NOTHING,
) -> tuple[Runtime, tuple[str, ...]]:
    """As `choose_runtime`, but it can build here; it need not run what it builds.

    Also raises `EngineError`, with the reasons, where no runtime that has the targets can build.
    """
    runtime, unique = choose_runtime(name, targets, precision, component_precision)
    if _build_problems(runtime, unique):
        reasons = [
            reason
            for known in _runtimes_with(unique, name)
            for reason in _build_problems(known, unique)
        ]
        raise EngineError(
            f"No runtime can build for {', '.join(unique)} here. {_in_words(reasons)}."
        )
    return runtime, unique


def _runtimes_with(targets: Sequence[str], name: str) -> tuple[Runtime, ...]:
    known = tuple(r for r in runtimes(name) if set(targets) <= set(r.targets))
    if not known:
        allowed = "; ".join(f"{r.name} has {', '.join(r.targets)}" for r in runtimes(name))
        raise UsageError(
            f"No runtime of --runtime {name} has the targets {', '.join(targets)}: {allowed}."
        )
    return known


def _build_problems(runtime: Runtime, targets: Sequence[str]) -> list[tuple[str, str, str]]:
    """Why a runtime cannot build here, for each of the targets that it cannot build for."""
    return [
        (runtime.name, target, available.detail)
        for target in targets
        if not (available := runtime.can_build(target)).ok
    ]


def _in_words(reasons: list[tuple[str, str, str]]) -> str:
    """Why each runtime cannot do each target, with the targets of one reason together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, target, detail in reasons:
        grouped.setdefault((name, detail), []).append(target)
    return "; ".join(
        f"{name} on {', '.join(targets)}: {detail}" for (name, detail), targets in grouped.items()
    )


def runs_here(components: Iterable[Sequence[EngineRecord]]) -> bool:
    """Whether this machine can run one of the engines of each component."""

    runs = cache(lambda name, target: _problem_here(name, target) is None)
    return all(any(runs(e.runtime, e.target) for e in engines) for engines in components)


def _problem_here(name: str, target: str) -> str | None:
    """Why this machine cannot run such engines, or None where it can."""
    # A bundle may be of a later version, with runtimes and targets of its own.
    runtime = _runtime(name) if name in _RUNTIMES else None
    if runtime is None or target not in runtime.targets:
        return "this version does not know it"
    available = runtime.availability(target)
    return None if available.ok else available.detail


def why_not_here(engines: Iterable[EngineRecord]) -> str:
    """Why this machine cannot run such engines, in words."""
    found = ((e.runtime, e.target, _problem_here(e.runtime, e.target)) for e in engines)
    return _in_words([(name, target, problem) for name, target, problem in found if problem])


def open_engine(
    bundle: Bundle,
    component: str,
    runtime: str = AUTO,
    options: EngineOptions | None = None,
) -> Engine:
    """Open a component's best engine that can run on this machine.

    Raises `EngineError` where the bundle has no such component, no engine for the runtime, or
    none that this machine can run, `UsageError` for an unknown runtime, and `BundleError` where the
    files are not those that were opened, or the graph reads what the manifest does not list.
    """
    record = bundle.manifest.components.get(component)
    if record is None:
        raise EngineError(
            f"The bundle {bundle.root} has no {component}; it holds "
            f"{', '.join(bundle.manifest.components)}."
        )
    options = options or EngineOptions()
    reasons: list[tuple[str, str, str]] = []
    for candidate in runtimes(runtime):
        own, targets = candidate.of(component, candidate.targets)
        if runtime == AUTO and own is not candidate:
            continue  # it has its own turn
        engines = own.engines(component, record)
        for target in targets:
            if target not in engines:
                continue
            available = own.availability(target, options.device)
            if available.ok:
                return _open_unchanged(bundle, own, component, engines[target], options)
            reasons.append((own.name, target, available.detail))
    built = sorted({f"{e.runtime} on {e.target}" for e in record.engines})
    why = _in_words(reasons) or f"it has engines for {', '.join(built) or 'nothing'}"
    emulation = _runtime(EMULATE)
    advice = ""
    if runtime != EMULATE and emulation.engines(component, record):
        advice = f" To look at its pictures on this machine all the same: --runtime {EMULATE}."
    raise EngineError(
        f"The bundle {bundle.root} has no {component} engine that runs here with --runtime "
        f"{runtime}: {why}.{advice}"
    )


def _open_unchanged(
    bundle: Bundle,
    runtime: Runtime,
    component: str,
    engine: EngineRecord,
    options: EngineOptions,
) -> Engine:
    record = bundle.manifest.components[component]
    with ExitStack() as on_error:
        with bundle.unchanged(record.files):
            if not runtime.builds:
                check_graph(bundle, record, engine.path)
            opened = runtime.open(component, record, engine, bundle.root, options)
            opened.emulated = runtime.emulates(engine.target, record.precision)
            on_error.callback(lambda: opened.close())
        on_error.pop_all()
    return opened
