"""Where `generate --preview` shows its pictures: a terminal, or a file that each step replaces."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fluxdeploy.errors import UsageError
from fluxdeploy.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

    from fluxdeploy.batch.draw import OnPreview

__all__ = ["TERMINAL", "check_terminal", "half_blocks", "to_file", "to_terminal"]

TERMINAL = Path("terminal")
"""What --preview has in place of a file."""

_COLUMNS, _LINES = 48, 20
"""Characters of a terminal, of two pixels each, one above the other."""

_BESIDE = 4
"""Lines of a terminal that the bars take, and what was typed."""

_LARGEST = 512
"""Pixels of a side of a file: larger ones take longer to write than a fast step."""


def check_terminal(as_json: bool) -> None:
    """Raise `UsageError` where there is no terminal to draw on."""
    if as_json:
        raise UsageError(
            "--preview terminal draws beside the progress, and --json shows none. Name a PNG file "
            "for --preview instead."
        )
    if not sys.stderr.isatty():
        raise UsageError(
            "--preview terminal draws on a terminal, and stderr is none. Name a PNG file for "
            "--preview instead: each step replaces it."
        )


def to_terminal(progress: Progress) -> OnPreview:
    """Shows pictures above the bars of a `Progress`."""

    def show(images: list[Image]) -> None:
        from fluxdeploy.host.sheet import side_by_side

        if progress.live is not None:
            columns, lines = progress.live.size
            most = min(columns - 1, _COLUMNS), min(lines - _BESIDE, _LINES)
            progress.put_above(half_blocks(side_by_side(images), *most))

    return show


def to_file(path: Path, factor: int) -> OnPreview:
    """Writes pictures to a PNG, `factor` times as large, never half of one."""

    def show(images: list[Image]) -> None:
        from fluxdeploy.host.pictures import write_png
        from fluxdeploy.host.sheet import side_by_side

        whole = side_by_side(images)
        scale = min(factor, max(1.0, _LARGEST / max(whole.size)))
        write_png(_scaled(whole, scale), path)

    return show


def half_blocks(image: Image, columns: int, lines: int) -> Text:
    """A picture in the characters of a terminal, at most so many across and down."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    scale = min(max(columns, 1) / image.width, 2 * max(lines, 1) / image.height)
    small = _scaled(image, scale)
    pixels = small.load()
    assert pixels is not None
    text = Text(no_wrap=True, end="")
    for top in range(0, small.height - 1, 2):
        for x in range(small.width):
            upper, lower = (Color.from_rgb(*pixels[x, top + y]) for y in (0, 1))  # type: ignore[misc]
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _scaled(image: Image, scale: float) -> Image:
    """A picture `scale` times as large, of an even number of lines."""
    from PIL.Image import Resampling

    width, half = round(image.width * scale), round(image.height * scale / 2)
    return image.resize((max(1, width), 2 * max(1, half)), Resampling.BICUBIC)
