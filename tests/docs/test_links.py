"""Links lead somewhere, and what the pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, code_blocks, links, section, tables

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_code_font_exists(page: Path) -> None:
    folders = "fluxdeploy|engines|exporters|tests|benchmarks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"make (\w+)", "\n".join(code_blocks(README, "sh")))
    named += re.findall(r"`make (\w+)`", README.read_text())
    assert {"demo", "test"} <= set(named) <= targets


def test_the_table_of_extras_is_that_of_the_metadata() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [row[0] for row in tables(section(README, "## Install"))[0]]
    assert sorted(named) == sorted(["none", *project["optional-dependencies"]])
    for extra in re.findall(r"'\.\[(\w+)\]'", README.read_text()):
        assert extra in project["optional-dependencies"]
