"""Sheets of many pictures: each with its prompt below it, or in rows and columns with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet", "grid_sheet", "side_by_side"]

_SMALLEST, _LARGEST = 256, 512
"""A picture's longer side on the sheet, in pixels: room for its caption, and still an overview."""

_ASPECT = 1.25
_GAP = 16
_FONT_SIZE = 17
_LINE_HEIGHT = 22
_MAX_LINES = 6
_LABEL_WIDTH = 200
"""Of the labels of rows, in pixels, at most; longer ones are wrapped."""

_PAPER, _INK, _FRAME = (255, 255, 255), (20, 20, 20), (190, 190, 190)


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures in a nearly square grid, row by row, each above its caption.

    Small pictures are enlarged by a whole factor and large ones reduced. A caption is wrapped, and
    cut after six lines.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    shown = [_resized(picture) for picture in pictures]
    width = max(picture.width for picture in shown)
    height = max(picture.height for picture in shown)
    texts = [_wrapped(caption, font, width) for caption in captions]
    cell_width = width + _GAP
    cell_height = height + _LINE_HEIGHT * max(len(lines) for lines in texts) + _GAP

    columns = _columns(len(shown), cell_width, cell_height)
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(zip(shown, texts, strict=True)):
        row, column = divmod(index, columns)
        left, top = _GAP + column * cell_width, _GAP + row * cell_height
        _paste(sheet, pen, picture, left, top)
        _write(pen, lines, font, left, top + height + _LINE_HEIGHT // 4)
    return sheet


def grid_sheet(
    pictures: Sequence[Image.Image], rows: Sequence[str], columns: Sequence[str], title: str
) -> Image.Image:
    """Pictures row by row, with the labels of columns above and those of rows on the left.

    The title stands above all. Small pictures are enlarged by a whole factor and large ones
    reduced; labels and title are wrapped, and cut after six lines.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    shown = [_resized(picture) for picture in pictures]
    width = max(picture.width for picture in shown)
    height = max(picture.height for picture in shown)
    beside = [_wrapped(label, font, _LABEL_WIDTH) for label in rows]
    above = [_wrapped(label, font, width) for label in columns]
    margin = math.ceil(max(font.getlength(line) for lines in beside for line in lines))
    left = _GAP + (margin + _GAP if margin else 0)
    whole = left + len(columns) * (width + _GAP)
    heading = _wrapped(title, font, whole - 2 * _GAP) if title else []
    labels = _GAP + _LINE_HEIGHT * len(heading) + _LINE_HEIGHT // 2
    top = labels + _LINE_HEIGHT * max(map(len, above)) + _LINE_HEIGHT // 4

    sheet = Image.new("RGB", (whole, top + len(rows) * (height + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, heading, font, _GAP, _GAP)
    for column, lines in enumerate(above):
        _write(pen, lines, font, left + column * (width + _GAP), labels)
    for row, lines in enumerate(beside):
        _write(pen, lines, font, _GAP, top + row * (height + _GAP))
    for index, picture in enumerate(shown):
        row, column = divmod(index, len(columns))
        _paste(sheet, pen, picture, left + column * (width + _GAP), top + row * (height + _GAP))
    return sheet


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a nearly square grid, row by row, with nothing between them."""
    width, height = pictures[0].size
    columns = _columns(len(pictures), width, height)
    rows = math.ceil(len(pictures) / columns)
    whole = Image.new("RGB", (columns * width, rows * height), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        whole.paste(picture, (column * width, row * height))
    return whole


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, left: int, top: int
) -> None:
    """Put a picture on the sheet, in a frame: a white one would have no edge on white paper."""
    sheet.paste(picture, (left, top))
    pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)


def _write(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    left: int,
    top: int,
) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * _LINE_HEIGHT), line, fill=_INK, font=font)


def _resized(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    scale = math.ceil(_SMALLEST / side) if side < _SMALLEST else min(1.0, _LARGEST / side)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrapped(
    caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """The lines of a caption, none wider than `width` pixels."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > _MAX_LINES:
        lines = lines[:_MAX_LINES]
        while lines[-1] and font.getlength(f"{lines[-1]}…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _columns(count: int, cell_width: int, cell_height: int) -> int:
    """How many columns leave little of a row empty, on a sheet a little wider than high."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = rows * columns - count
        aspect = columns * cell_width / (rows * cell_height)
        return empty / columns + abs(math.log(aspect / _ASPECT))

    return min(range(1, count + 1), key=cost)
