"""The page of the C++ library shows what the tree has."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, code_blocks, tables

PAGE = ROOT / "docs" / "cpp.md"
CPP = ROOT / "engines" / "cpp"


def test_the_program_of_the_page_is_the_example_that_is_built_and_run() -> None:
    assert code_blocks(PAGE, "cpp") == [(CPP / "examples" / "picture.cpp").read_text()]


def test_the_table_has_the_builds_options() -> None:
    declared = set(re.findall(r"^(?:option|set)\((FLUXDEPLOY_\w+)", _cmake(), re.MULTILINE))
    # Of the project's own tests alone, or told in the row of another one.
    untold = {"FLUXDEPLOY_TESTS", "FLUXDEPLOY_WERROR"}
    rows = {row[0] for table in tables(PAGE.read_text()) for row in table}
    assert declared - untold <= rows


def _cmake() -> str:
    return (CPP / "CMakeLists.txt").read_text()
