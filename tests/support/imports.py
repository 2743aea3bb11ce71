"""Who imports whom in this repository, read from the source of every module.

An import counts wherever it stands: at the top, in a function, under TYPE_CHECKING, and as a
module's whole name in a string, which is how modules are loaded late.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "IMPORTS",
    "LEAVES",
    "MODULES",
    "TRAINING",
    "Import",
    "file_of",
    "imports_in",
    "neighbours",
]

ROOT = Path(__file__).resolve().parents[2]

TRAINING = ("diffusers", "onnx", "onnx_ir", "onnxscript", "torch", "transformers")
"""The libraries of other people that are read too: those that a deployment must do without."""


@dataclass(frozen=True)
class Import:
    """`module` imports `name` in this line."""

    module: str
    name: str
    line: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.module, self.name

    def __str__(self) -> str:
        return f"{file_of(self.module)}:{self.line}: {self.module} imports {self.name}"


def _modules() -> dict[str, Path]:
    found = {}
    for tree in ("fluxdeploy", "engines", "exporters"):
        for path in sorted((ROOT / tree).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()

LEAVES = tuple(
    module
    for module, path in MODULES.items()
    if module == f"fluxdeploy.{path.stem}" and path.stem != "__main__"
)
"""The single files of `fluxdeploy`, each about one thing that every room may need."""


def file_of(module: str) -> str:
    """A module's file, from the root of the repository."""
    return MODULES[module].relative_to(ROOT).as_posix()


def imports_in(module: str, source: str) -> Iterator[Import]:
    """What a module's source imports of this repository and of `TRAINING`."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            where = f"{file_of(module)}:{node.lineno}"
            assert node.level == 0, f"{where}: name the whole module"
            assert node.module
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        elif isinstance(node, ast.Constant) and node.value in MODULES and "." in node.value:
            names = [node.value]
        for name in dict.fromkeys(names):
            known = name in MODULES or name.partition(".")[0] in TRAINING
            if known and name != module:
                yield Import(module, name, getattr(node, "lineno", 0))


IMPORTS = tuple(
    found for name, path in MODULES.items() for found in imports_in(name, path.read_text("utf-8"))
)


def neighbours(each: Import) -> list[tuple[str, str]]:
    """The two neighbours that an import goes between; none where one of its ends holds the other.

    They are spelt with slashes, since a package is not its `__init__`, the module of that name.
    """
    parts = (each.module.split("."), each.name.split("."))
    shared = 0
    while shared < min(map(len, parts)) and parts[0][shared] == parts[1][shared]:
        shared += 1
    if shared == 0 or shared == min(map(len, parts)):
        return []
    start, end = ("/".join(part[: shared + 1]) for part in parts)
    return [(start, end)]
