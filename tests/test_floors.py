"""The walls between the rooms: who may import whom, and that nobody does in a circle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from tests.support.imports import (
    IMPORTS,
    LEAVES,
    MODULES,
    Import,
    file_of,
    imports_in,
    neighbours,
)

_CONTRACT = (*LEAVES, "fluxdeploy.bundle", "fluxdeploy.lora", "fluxdeploy.sampling")
_BELOW_HOST = (*_CONTRACT, "fluxdeploy.text", "engines")
_TOP = (
    *_BELOW_HOST,
    "fluxdeploy.host",
    "fluxdeploy",
    "exporters",
    "fluxdeploy.bench",
    "fluxdeploy.build",
    "fluxdeploy.demo",
    "fluxdeploy.serve",
    "fluxdeploy.verify",
)

FLOORS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, LEAVES),
    **dict.fromkeys(_CONTRACT[len(LEAVES) :], _CONTRACT),
    "fluxdeploy.text": _CONTRACT,
    "engines": (*_CONTRACT, "engines.emulate", "engines.native.build"),
    "engines.emulate": (*_CONTRACT, "engines"),
    "engines.native.build": (*_CONTRACT, "engines", "engines.native.match", "engines.native.pack"),
    "engines.native.graph": (*_CONTRACT, "engines"),
    "engines.native.match": (*_CONTRACT, "engines", "engines.native.graph"),
    "engines.native.pack": (*_CONTRACT, "engines"),
    "fluxdeploy.host": _BELOW_HOST,
    "fluxdeploy.serve": (*_BELOW_HOST, "fluxdeploy.host", "fluxdeploy"),
    "fluxdeploy": ("fluxdeploy.host",),
    "exporters": _CONTRACT,
    "exporters.training": (*_CONTRACT, "exporters", "fluxdeploy.demo"),
    "fluxdeploy.demo": _TOP,
    "fluxdeploy.bench": _TOP,
    "fluxdeploy.build": _TOP,
    "fluxdeploy.verify": _TOP,
    "fluxdeploy.cli": _TOP,
    "fluxdeploy.__main__": ("fluxdeploy.cli",),
}
"""What each room may see beside itself. A module belongs to the longest name that it begins with;
`fluxdeploy` is the package's `__init__` alone, the door to the host."""

_WITH_TRAINING = (
    "engines.emulate",
    "engines.native.build",
    "engines.native.graph",
    "engines.native.match",
    "engines.native.pack",
    "exporters",
    "exporters.training",
    "fluxdeploy.bench",
    "fluxdeploy.build",
    "fluxdeploy.verify",
)
"""The rooms that may import `tests.support.imports.TRAINING`; no other ever does."""


def room(module: str) -> str:
    """The row of `FLOORS` that a module belongs to."""
    if module == "fluxdeploy":
        return module
    rooms = [row for row in FLOORS if row != "fluxdeploy" and f"{module}.".startswith(f"{row}.")]
    assert rooms, f"{file_of(module)} stands in no room: give it a row in FLOORS"
    return max(rooms, key=len)


def upward(imports: Iterable[Import]) -> list[Import]:
    """The imports of what the module's room may not see."""
    found = []
    for each in imports:
        own = room(each.module)
        if each.name not in MODULES:
            allowed = own in _WITH_TRAINING
        else:
            allowed = room(each.name) in (own, *FLOORS[own])
        if not allowed:
            found.append(each)
    return found


def circular(imports: Iterable[Import]) -> list[Import]:
    """The imports that are part of a circle.

    A circle is one of modules, or one of neighbours: modules and packages that stand in one
    package, where a package imports what any of its modules does.
    """
    edges: list[tuple[str, str, Import]] = []
    for each in imports:
        if each.name in MODULES:
            edges.append((each.module, each.name, each))
            edges += [(start, end, each) for start, end in neighbours(each)]
    after: dict[str, set[str]] = {}
    for start, end, _ in edges:
        after.setdefault(start, set()).add(end)
    return list(dict.fromkeys(each for start, end, each in edges if start in _reached(after, end)))


def _reached(after: Mapping[str, set[str]], start: str) -> set[str]:
    reached, waiting = {start}, [start]
    while waiting:
        new = after.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def _listed(imports: Iterable[Import]) -> str:
    return "\n".join(str(each) for each in imports)


def test_every_row_is_a_room() -> None:
    assert {room(module) for module in MODULES} == set(FLOORS)
    for allowed in FLOORS.values():
        assert set(allowed) <= set(FLOORS)


def test_no_module_imports_upward() -> None:
    found = upward(IMPORTS)
    assert not found, f"A room may see what FLOORS gives it, and no more:\n{_listed(found)}"


def test_no_import_is_part_of_a_circle() -> None:
    found = circular(IMPORTS)
    assert not found, f"These imports make a circle:\n{_listed(found)}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fluxdeploy.errors", "import fluxdeploy.bundle"),
        ("fluxdeploy.bundle.files", "from fluxdeploy.text import load_tokenizers"),
        ("fluxdeploy.sampling.noise", "from engines import open_engine"),
        ("fluxdeploy.text", "from fluxdeploy.host import pipeline"),
        ("fluxdeploy.text", "import transformers"),
        ("engines.base", "from fluxdeploy.text import Tokenizer"),
        ("engines.golden", "import torch.nn"),
        ("engines.registry", "_HOME = 'fluxdeploy.host.pipeline'"),
        ("fluxdeploy.host.pipeline", "from exporters.models import vae"),
        ("fluxdeploy.host.pipeline", "from fluxdeploy import __version__"),
        ("fluxdeploy.host.request", "from fluxdeploy.verify import pictures"),
        ("exporters.export", "from engines.base import Engine"),
        ("exporters.checkpoint.hub", "from fluxdeploy.demo.scenes import Scene"),
        ("exporters.graph.trace", "from fluxdeploy.build import keys"),
        ("fluxdeploy.build.keys", "from fluxdeploy.cli.options import THREADS"),
    ],
)
def test_a_line_that_looks_upward_is_named(module: str, line: str) -> None:
    source = f"if TYPE_CHECKING:\n    def late():\n        {line}\n"
    (found,) = upward(imports_in(module, source))
    assert str(found).startswith(f"{file_of(module)}:3: {module} imports {found.name}")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fluxdeploy.bundle.typed_json", "from fluxdeploy.bundle.manifest import Manifest"),
        ("fluxdeploy.bundle.files", "from fluxdeploy.sampling.latents import pack"),
        ("fluxdeploy.demo.scenes", "from fluxdeploy.build import keys"),
        ("exporters.checkpoint.names", "from exporters.export import export_component"),
        ("exporters.models.vae", "from exporters.components import chains"),
        ("engines.targets", "from engines.registry import runtimes"),
    ],
)
def test_a_line_that_closes_a_circle_is_named(module: str, line: str) -> None:
    (new,) = imports_in(module, line)
    assert new in circular([*IMPORTS, new])
