"""Runtimes and engines: an engine runs one component of a bundle on NumPy arrays."""

from engines.base import (
    Array,
    Availability,
    Binding,
    BuildSettings,
    Engine,
    EngineOptions,
    EngineSource,
    Extra,
    Runtime,
)
from engines.editions import choose_edition, choose_runtimes, edition_runs_here
from engines.registry import (
    AUTO,
    choose_builder,
    choose_for_cpu,
    choose_runtime,
    choose_target,
    open_engine,
    runs_here,
    runtime_names,
    runtimes,
)

__all__ = [
    "AUTO",
    "Array",
    "Availability",
    "Binding",
    "BuildSettings",
    "Engine",
    "EngineOptions",
    "EngineSource",
    "Extra",
    "Runtime",
    "choose_builder",
    "choose_edition",
    "choose_for_cpu",
    "choose_runtime",
    "choose_runtimes",
    "choose_target",
    "edition_runs_here",
    "open_engine",
    "runs_here",
    "runtime_names",
    "runtimes",
]
