"""A benchmark as one HTML file that needs nothing else: tables, and bars drawn in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fluxdeploy.bench.clock import Ratio
from fluxdeploy.bench.report.record import BenchReport, to_json
from fluxdeploy.bench.report.tables import (
    TextTable,
    describe_machine_in_words,
    labels,
    make_tables,
    notes,
    seconds,
)
from fluxdeploy.bundle.files import write_atomic

__all__ = ["render_page", "write_page"]

_COLOURS = ("#4c78a8", "#72b7b2", "#f58518", "#54a24b", "#b279a2", "#e45756", "#9d9da1")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8885; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; } svg text { fill: currentColor; }
.key span { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
p { color: #888; margin: .4rem 0; }
pre { max-height: 20rem; overflow: auto; font-size: 12px; }
"""

_WIDTH, _LABELS, _ROW, _BAR = 900, 230, 30, 18
"""Of a drawing, in its own units: its width, the labels' part of it, a row and the bar in it."""

_FIGURES = 190
"""Room for the figures behind the longest bar."""


def write_page(report: BenchReport, path: Path) -> None:
    """Write the page, whole or not at all. Raises `BundleError` where the disk refuses."""
    write_atomic(path, render_page(report))


def render_page(report: BenchReport) -> str:
    """The page as HTML."""
    work = report.workload
    tables = make_tables(report)
    parts = [
        f"<h1>{escape(tables[0].title)}</h1>",
        f"<p>{escape(describe_machine_in_words(report))}</p>",
        f"<p>fluxdeploy {escape(report.fluxdeploy)}, “{escape(work.prompt)}”, guidance "
        f"{work.guidance:g}, {work.tokens} text tokens, {work.threads} threads, "
        f"{escape(work.device)}</p>",
        f"<h2>Times faster than {escape(labels(report)[report.baseline])}, a whole picture</h2>",
        _draw_faster(report),
        "<h2>Where a picture's time goes</h2>",
        _draw_parts(report),
        *map(_table, tables),
        "<h2>Notes</h2>",
        *(f"<p>{escape(line)}</p>" for line in notes(report)),
        f"<details><summary>All figures as JSON</summary><pre>{escape(to_json(report))}</pre>"
        "</details>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(tables[0].title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n'
        "</table></div>"
    )


def _draw_faster(report: BenchReport) -> str:
    names = list(labels(report).values())
    ratios = [each.timings["picture"].ratio for each in report.contenders]
    known = [ratio for ratio in ratios if ratio is not None]
    scale = (_WIDTH - _LABELS - _FIGURES) / max(ratio.high for ratio in known)
    body = []
    for row, ratio in enumerate(ratios):
        if ratio is not None:
            body.append(_faster_row(row, ratio, scale))
    one = _LABELS + scale
    bottom = _ROW * len(names)
    body.append(
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{bottom}" stroke="currentColor" '
        'stroke-dasharray="4 3"/>'
    )
    return _svg(names, body)


def _faster_row(row: int, ratio: Ratio, scale: float) -> str:
    y = row * _ROW
    middle = y + _ROW / 2
    low, high = (_LABELS + scale * end for end in (ratio.low, ratio.high))
    words = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return (
        _bar(row, _LABELS, scale * ratio.median, _COLOURS[0], words)
        + f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" '
        'stroke="currentColor" stroke-width="2"/>'
        + f'<text x="{max(high, low) + 8:.1f}" y="{middle + 5}">{words}</text>'
    )


def _draw_parts(report: BenchReport) -> str:
    names = list(labels(report).values())
    parts = [each.parts(report.workload.steps) for each in report.contenders]
    words = list(dict.fromkeys(word for own in parts for word in own))
    colours = dict(zip(words, _COLOURS, strict=False))
    totals = [sum(own.values()) for own in parts]
    scale = (_WIDTH - _LABELS - _FIGURES) / max(totals)
    body = []
    for row, (own, total) in enumerate(zip(parts, totals, strict=True)):
        x = float(_LABELS)
        for word, value in own.items():
            hint = f"{word}: {seconds(value)}"
            body.append(_bar(row, x, scale * value, colours[word], hint))
            x += scale * value
        body.append(f'<text x="{x + 8:.1f}" y="{(row + 0.5) * _ROW + 5}">{seconds(total)}</text>')
    key = "".join(
        f'<span><i style="background:{colours[word]}"></i>{escape(word)}</span>' for word in words
    )
    return f'{_svg(names, body)}\n<div class="key">{key}</div>'


def _bar(row: int, x: float, width: float, colour: str, hint: str) -> str:
    y = row * _ROW + (_ROW - _BAR) / 2
    return (
        f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
        f"<title>{escape(hint)}</title></rect>"
    )


def _svg(names: Sequence[str], body: Sequence[str]) -> str:
    texts = [
        f'<text x="{_LABELS - 8}" y="{(row + 0.5) * _ROW + 5}" text-anchor="end">'
        f"{escape(name)}</text>"
        for row, name in enumerate(names)
    ]
    height = _ROW * len(names)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">' + "".join([*texts, *body]) + "</svg>"
