"""Runtimes and engines: an engine runs one component of a bundle on NumPy arrays."""

from engines.base import Array, Availability, Binding, Engine, EngineOptions, Runtime
from engines.registry import AUTO, choose_target, open_engine, runtime_names, runtimes

__all__ = [
    "AUTO",
    "Array",
    "Availability",
    "Binding",
    "Engine",
    "EngineOptions",
    "Runtime",
    "choose_target",
    "open_engine",
    "runtime_names",
    "runtimes",
]
