"""Links lead somewhere, and what the pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, code_blocks, links, name_of, section, tables

README = ROOT / "README.md"
CONTENTS = ROOT / "docs" / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_in_code_font_exists(page: Path) -> None:
    folders = "fluxdeploy|engines|exporters|tests|benchmarks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_readme_is_a_door() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_contents_lead_to_every_page(page: Path) -> None:
    linked = {(CONTENTS.parent / link.partition("#")[0]).resolve() for link in links(CONTENTS)}
    card = ROOT / "fluxdeploy" / "demo" / "checkpoints" / "README.md"
    if page not in (CONTENTS, card):
        assert page in linked
    assert CONTENTS in {(ROOT / link).resolve() for link in links(README)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_s_own_contents_name_each_of_its_sections(page: Path) -> None:
    own = [link[1:] for link in re.findall(r"^- \[.*\]\((#.*)\)$", page.read_text(), re.MULTILINE)]
    if own:
        headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
        assert own == [heading.lower().replace(" ", "-") for heading in headings]


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named: list[str] = []
    for page in PAGES:
        named += re.findall(r"^make (\w+)", "\n".join(code_blocks(page, "sh")), re.MULTILINE)
        named += re.findall(r"`make (\w+)`", page.read_text())
    assert {"demo", "test", "lint", "docs"} <= set(named) <= targets


def test_the_readme_begins_with_the_two_commands() -> None:
    first = code_blocks(README, "sh")[0]
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]


def test_the_scripts_in_the_pages_take_the_options_that_are_shown() -> None:
    found = 0
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for script, rest in re.findall(r"python ((?:benchmarks|docs)/\w+\.py)([^`\n]*)", text):
            source = (ROOT / script).read_text()
            for option in re.findall(r"--[\w-]+", rest):
                assert f'"{option}"' in source, f"{name_of(page)}: {script} {option}"
            found += 1
    assert found > 10


def test_the_table_of_extras_is_that_of_the_metadata() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [row[0] for row in tables(section(README, "## Install"))[0]]
    assert sorted(named) == sorted(["none", *project["optional-dependencies"]])
    for extra in re.findall(r"'\.\[(\w+)\]'", README.read_text()):
        assert extra in project["optional-dependencies"]


def test_the_runtimes_and_targets_are_those_that_are_known() -> None:
    from engines import runtime_names, runtimes

    said: dict[str, set[str]] = {}
    for runtime, targets, _ in tables(section(README, "## What runs where"))[0]:
        said.setdefault(runtime, set()).update(targets.split(", "))
    known = {name: set(runtimes(name)[0].targets) for name in runtime_names()}
    assert said.keys() == known.keys()
    for name, targets in said.items():
        if targets != {"the machine's GPU"}:
            assert targets == known[name], name
