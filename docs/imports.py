"""Draws which room imports which, as docs/imports.svg: `python docs/imports.py`.

A box is a room: a package below `fluxdeploy`, `engines`, or `exporters`, whose own packages have
another picture, docs/imports_exporters.svg. An arrow that others imply is left out; one that runs
back is red.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.support.imports import IMPORTS, LEAVES

__all__ = ["PICTURES", "draw", "exporters", "picture", "rooms"]

DOCS = Path(__file__).resolve().parent

_WIDTH, _HEIGHT = 132, 34
_COLUMN, _ROW = 24, 86
_BEND = 8  # the width that a line takes where it passes a row

Graph = Mapping[str, frozenset[str]]


def rooms() -> Graph:
    """The rooms of the tree, each with the others that its modules import."""

    def room(module: str) -> str:
        tree, _, rest = module.partition(".")
        if module in LEAVES:
            return ", ".join(leaf.partition(".")[2] for leaf in LEAVES)
        if tree in ("engines", "exporters"):
            return tree
        name = rest.partition(".")[0]
        return name if tree == "fluxdeploy" and name != "__main__" else ""

    return _graph((room(each.module), room(each.name)) for each in IMPORTS)


def exporters() -> Graph:
    """The packages and the single files of `exporters`, each with the others that it imports."""

    def package(module: str) -> str:
        tree, _, rest = module.partition(".")
        return rest.partition(".")[0] if tree == "exporters" else ""

    return _graph((package(each.module), package(each.name)) for each in IMPORTS)


PICTURES = {DOCS / "imports.svg": rooms, DOCS / "imports_exporters.svg": exporters}
"""What is drawn, by the file that holds it."""


def _graph(edges: Iterable[tuple[str, str]]) -> Graph:
    after: dict[str, set[str]] = {}
    for start, end in edges:
        for name in (start, end):
            if name:
                after.setdefault(name, set())
        if start and end and start != end:
            after[start].add(end)
    return {name: frozenset(after[name]) for name in sorted(after)}


def _reached(graph: Graph, start: str) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def _layers(graph: Graph) -> tuple[dict[str, int], set[tuple[str, str]]]:
    """The row of each name, 0 at the bottom and above all that it imports, and what runs back."""
    rows: dict[str, int] = {}
    back: set[tuple[str, str]] = set()

    def place(name: str, path: tuple[str, ...]) -> int:
        if name not in rows:
            below = [-1]
            for end in sorted(graph[name]):
                if end in (*path, name):
                    back.add((name, end))
                else:
                    below.append(place(end, (*path, name)))
            rows[name] = max(below) + 1
        return rows[name]

    for name in graph:
        place(name, ())
    return rows, back


def _needed(graph: Graph) -> list[tuple[str, str]]:
    """The edges that no longer way implies."""
    return [
        (start, end)
        for start, ends in graph.items()
        for end in sorted(ends)
        if not any(end in _reached(graph, other) for other in ends - {end})
    ]


def _ordered(rows: list[list[str]], edges: Sequence[tuple[str, str]]) -> None:
    """Order each row so that few lines cross: by the middle of what a name is joined to."""
    for _ in range(12):
        for this, other in (*itertools.pairwise(rows), *itertools.pairwise(rows[::-1])):
            place = {name: index / max(len(this) - 1, 1) for index, name in enumerate(this)}
            joined: dict[str, list[float]] = {name: [] for name in other}
            for start, end in (*edges, *((end, start) for start, end in edges)):
                if start in joined and end in place:
                    joined[start].append(place[end])
            other.sort(key=lambda name: sum(joined[name]) / max(len(joined[name]), 1))


def draw(graph: Graph, title: str) -> str:
    """The graph as SVG; equal graphs give equal text."""
    layer, back = _layers(graph)
    forward = {name: ends - {end for s, end in back if s == name} for name, ends in graph.items()}
    rows: list[list[str]] = [[] for _ in range(max(layer.values()) + 1)]
    for name, row in layer.items():
        rows[row].append(name)
    # A line over several rows has a bend in each of them, so that boxes make room for it.
    steps: list[tuple[str, str]] = []
    lines: list[list[str]] = []
    for start, end in _needed(forward):
        line = [start]
        for row in range(layer[start] - 1, layer[end], -1):
            line.append(f"{start}>{end}@{row}")
            rows[row].append(line[-1])
        lines.append([*line, end])
        steps += itertools.pairwise(lines[-1])
    _ordered(rows, steps)
    return _svg(graph, title, rows, lines, sorted(back))


def picture(graph: Callable[[], Graph]) -> str:
    """One of `PICTURES` as SVG."""
    return draw(graph(), str(graph.__doc__))


def _svg(
    graph: Graph,
    title: str,
    rows: Sequence[Sequence[str]],
    lines: Sequence[Sequence[str]],
    back: Sequence[tuple[str, str]],
) -> str:
    wide = {
        name: max(_WIDTH, 8 * len(name) + 24) if name in graph else _BEND
        for n in rows
        for name in n
    }
    spans = [sum(wide[name] + _COLUMN for name in row) for row in rows]
    at: dict[str, tuple[float, float]] = {}
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        x = (max(spans) - span) / 2 + _COLUMN / 2 + 10
        for name in row:
            at[name] = (x + wide[name] / 2, (len(rows) - 1 - index) * _ROW + 30)
            x += wide[name] + _COLUMN
    width, height = max(spans) + 20, (len(rows) - 1) * _ROW + 60
    body = [f'<path class="line" d="{_path([at[name] for name in line])}"/>' for line in lines]
    body += [f'<path class="line back" d="{_path([at[a], at[b]])}"/>' for a, b in back]
    for name in graph:
        x, y = at[name]
        body.append(
            f'<rect class="box" x="{x - wide[name] / 2:.0f}" y="{y - _HEIGHT / 2:.0f}" '
            f'width="{wide[name]:.0f}" height="{_HEIGHT}" rx="6"/>'
            f'<text class="in" x="{x:.0f}" y="{y + 5:.0f}">{name}</text>'
        )
    return _PAGE.format(
        width=f"{width:.0f}", height=f"{height:.0f}", title=title, body="\n".join(body)
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line from the edge of the first box through the bends to the edge of the last."""
    down = 1 if points[-1][1] > points[0][1] else -1
    first, last = points[0], points[-1]
    through = [
        (first[0], first[1] + down * _HEIGHT / 2),
        *points[1:-1],
        (last[0], last[1] - down * (_HEIGHT / 2 + 3)),
    ]
    text = f"M{through[0][0]:.0f},{through[0][1]:.0f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(through):
        middle = (y0 + y1) / 2
        text += f" C{x0:.0f},{middle:.0f} {x1:.0f},{middle:.0f} {x1:.0f},{y1:.0f}"
    return text


_PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
     width="{width}" height="{height}" font-size="14"
     font-family="-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif">
<title>{title}</title>
<defs>
<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
        orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#848d97"/></marker>
<style>
.box {{ fill: #0a69c7 }}
.in {{ fill: #ffffff; text-anchor: middle }}
.line {{ fill: none; stroke: #848d97; stroke-width: 1.6; marker-end: url(#arrow) }}
.back {{ stroke: #cf222e; stroke-dasharray: 5 4 }}
</style>
</defs>
{body}
</svg>
"""


if __name__ == "__main__":
    for path, graph in PICTURES.items():
        path.write_text(picture(graph), encoding="utf-8")
