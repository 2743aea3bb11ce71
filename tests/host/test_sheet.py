"""Sheets show every picture, and every caption and label as a whole where there is room."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fluxdeploy.host.sheet import contact_sheet, grid_sheet, side_by_side

COLOURS = [(200, 20 * index, 60) for index in range(12)]


def pictures(count: int, size: tuple[int, int] = (128, 96)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in COLOURS[:count]]


def boxes(sheet: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each picture, by its colour."""
    pixels = np.asarray(sheet)
    found = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((pixels == colour).all(-1))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return [tuple(map(int, box)) for box in found]  # type: ignore[misc]


def ink(sheet: Image.Image) -> NDArray[np.bool_]:
    """Where the sheet is dark."""
    return np.asarray(sheet.convert("L")) < 40


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (12, 4)]
)
def test_pictures_are_in_reading_order_in_a_nearly_square_grid(count: int, columns: int) -> None:
    sheet = contact_sheet(pictures(count, (128, 128)), ["a fox"] * count)
    places = [(top, left) for left, top, _, _ in boxes(sheet, count)]
    assert places == sorted(places)
    assert len(set(places)) == count
    assert len({left for _, left in places}) == columns


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((128, 96), (256, 192)),
        ((96, 160), (192, 320)),
        ((256, 256), (256, 256)),
        ((400, 300), (400, 300)),
        ((1024, 768), (512, 384)),
    ],
)
def test_sizes_are_made_fit_for_captions(size: tuple[int, int], shown: tuple[int, int]) -> None:
    ((left, top, right, bottom),) = boxes(contact_sheet(pictures(1, size), ["a fox"]), 1)
    assert (right - left, bottom - top) == shown


def test_each_caption_is_below_its_picture() -> None:
    sheet = contact_sheet(pictures(4), ["a fox", "", "an owl", ""])
    dark = ink(sheet)
    for (left, _, right, bottom), written in zip(
        boxes(sheet, 4), (True, False, True, False), strict=True
    ):
        assert dark[bottom + 2 : bottom + 24, left:right].any() == written


def test_a_long_caption_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    caption = "a large red circle above a small blue square on a white background"
    lines = written(monkeypatch, caption)
    assert 1 < len(lines) < 6
    assert " ".join(lines) == caption


@pytest.mark.parametrize("caption", ["word " * 500, "w" * 3000])
def test_an_endless_caption_is_cut(monkeypatch: pytest.MonkeyPatch, caption: str) -> None:
    lines = written(monkeypatch, caption)
    assert len(lines) == 6
    assert lines[-1].endswith("…")


def test_every_line_fits_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    font = ImageFont.load_default(17)
    for line in written(monkeypatch, "supercalifragilisticexpialidociousandmore tiny words " * 4):
        assert font.getlength(line) <= 256


def written(monkeypatch: pytest.MonkeyPatch, caption: str) -> list[str]:
    """The lines that a caption becomes."""
    lines: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, place: object, text: str, **options: object) -> None:
        lines.append(text)
        draw(self, place, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    contact_sheet(pictures(1), [caption])
    return lines


def test_a_grid_has_its_pictures_in_rows_and_columns() -> None:
    sheet = grid_sheet(pictures(6), ["seed 1", "seed 2"], ["a", "b", "c"], "a fox")
    places = [(top, left) for left, top, _, _ in boxes(sheet, 6)]
    assert places == sorted(places)
    assert len({top for top, _ in places}) == 2
    assert len({left for _, left in places}) == 3


def test_a_grids_labels_are_beside_and_above_its_pictures() -> None:
    """The label of the second column alone, and of the second row alone."""
    dark = ink(grid_sheet(pictures(4), ["", "seed 2"], ["", "steps 8"], ""))
    shown = boxes(grid_sheet(pictures(4), ["", "seed 2"], ["", "steps 8"], ""), 4)
    (left, top, *_), (right, *_), (_, below, *_) = shown[0], shown[1], shown[2]
    assert dark[:top, right:].any()
    assert not dark[:top, : right - 1].any()
    assert dark[below:, : left - 1].any()
    assert not dark[: below - 1, : left - 1].any()


def test_a_grids_title_is_above_all() -> None:
    titled, plain = (
        grid_sheet(pictures(2), [""], ["", ""], title) for title in ("a fox " * 99, "")
    )
    ((_, top, *_), _), ((_, before, *_), _) = boxes(titled, 2), boxes(plain, 2)
    assert top - before == 6 * 22
    assert ink(titled)[:top].any()
    assert not ink(plain).any()


def test_pictures_beside_each_other_touch() -> None:
    sheet = side_by_side(pictures(4, (6, 4)))
    assert sheet.size == (12, 8)
    assert boxes(sheet, 4) == [(0, 0, 6, 4), (6, 0, 12, 4), (0, 4, 6, 8), (6, 4, 12, 8)]
