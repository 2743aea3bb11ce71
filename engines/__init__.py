"""Runtimes and engines: an engine runs one component of a bundle on NumPy arrays."""

from engines.base import (
    Array,
    Availability,
    Binding,
    BuildReport,
    BuildSettings,
    Engine,
    EngineOptions,
    EngineSource,
    Runtime,
)
from engines.registry import (
    AUTO,
    choose_builder,
    choose_runtime,
    choose_target,
    open_engine,
    runtime_names,
    runtimes,
)
from engines.targets import precision_problem

__all__ = [
    "AUTO",
    "Array",
    "Availability",
    "Binding",
    "BuildReport",
    "BuildSettings",
    "Engine",
    "EngineOptions",
    "EngineSource",
    "Runtime",
    "choose_builder",
    "choose_runtime",
    "choose_target",
    "open_engine",
    "precision_problem",
    "runtime_names",
    "runtimes",
]
