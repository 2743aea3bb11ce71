"""docs/many.md names the fields that there are, and its files are read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from fluxdeploy.batch.index import Entry
from fluxdeploy.batch.lines import read_lines
from fluxdeploy.batch.order import COLUMNS, read_orders
from tests.docs.pages import ROOT, code_blocks, section, tables

MANY = ROOT / "docs" / "many.md"


def test_the_fields_are_those_of_the_code() -> None:
    (table,) = tables(section(MANY, "## Fields"))
    assert {name for row in table for name in row[:2] if name} == set(COLUMNS)


def test_the_index_has_the_fields_of_the_code() -> None:
    (table,) = tables(section(MANY, "## The index"))
    assert [row[0] for row in table] == [field.name for field in fields(Entry)]


@pytest.mark.parametrize(("kind", "seeds"), [("json", 5), ("csv", 4), ("text", 2)])
def test_each_file_is_read(tmp_path: Path, kind: str, seeds: int) -> None:
    (source := tmp_path / "p").write_text(code_blocks(MANY, kind)[0])
    read = [
        read_orders(line.values, {"seed": None}, tmp_path)[0] for line in read_lines(str(source))
    ]
    assert len([order for orders in read for order in orders]) == seeds
