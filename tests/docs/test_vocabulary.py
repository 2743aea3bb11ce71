"""docs/vocabulary.md gives each word one meaning, and a place in the code that is there."""

from __future__ import annotations

import pkgutil
import re

import pytest

from tests.docs.pages import ROOT, tables

PAGE = ROOT / "docs" / "vocabulary.md"
ROWS = [row for table in tables(PAGE.read_text()) for row in table]


def test_a_word_has_one_meaning() -> None:
    words = [word for row in ROWS for word in row[0].split(", ")]
    assert len(words) == len(set(words)) > 40


@pytest.mark.parametrize("place", sorted({row[2] for row in ROWS}))
def test_the_place_of_a_word_is_there(place: str) -> None:
    if place.startswith("exporters"):
        pytest.importorskip("torch")
    pkgutil.resolve_name(place)


def test_a_sentence_fits_a_line_of_the_table() -> None:
    for word, meaning, _ in ROWS:
        assert meaning, word
        assert not re.search(r"\.( |$)", meaning), f"{word}: one sentence, without its stop"
