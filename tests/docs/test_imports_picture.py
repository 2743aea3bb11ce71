"""The pictures of the imports are those of the code."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.docs.pages import ROOT, links


@pytest.fixture
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imports_picture", ROOT / "docs" / "imports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_not_stale_and_on_a_page(pictures: ModuleType) -> None:
    shown = links(ROOT / "docs" / "develop.md")
    for path, graph in pictures.PICTURES.items():
        drawn = pictures.picture(graph)
        assert drawn == path.read_text(), f"{path.name} is stale: run `make docs`"
        assert path.name in shown


def test_every_room_has_a_box(pictures: ModuleType) -> None:
    rooms = ", ".join(pictures.rooms()).split(", ")
    packages = {path.parent.name for path in (ROOT / "fluxdeploy").glob("*/__init__.py")}
    assert packages | {"engines", "exporters", "errors", "precision"} <= set(rooms)
    exporters = {path for path in (ROOT / "exporters").iterdir() if path.name[0] not in "_."}
    inside = {path.stem for path in exporters if path.is_dir() or path.suffix == ".py"}
    assert inside == set(pictures.exporters())


def test_an_import_that_others_imply_has_no_line_and_one_that_runs_back_is_red(
    pictures: ModuleType,
) -> None:
    graph = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}
    drawn = pictures.draw(graph, "three in a row")
    assert drawn.count('class="line"') == 2
    assert drawn.count('class="line back"') == 0
    drawn = pictures.draw({**graph, "c": frozenset("a")}, "a circle")
    assert drawn.count('class="line"') == 2
    assert drawn.count('class="line back"') == 1
