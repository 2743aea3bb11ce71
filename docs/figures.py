"""Puts the measured figures into README.md: `python docs/figures.py`.

The table stands between `<!-- export_scale -->` and `<!-- /export_scale -->` and is made from
benchmarks/results/export_scale.json, so that no figure is written by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["fill", "render"]

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "export_scale.json"

_BLOCK = re.compile(r"(?<=<!-- export_scale -->\n).*?(?=<!-- /export_scale -->)", re.DOTALL)
_LAYOUTS = {"diffusers": "diffusers layout", "bfl": "BFL layout"}


def render(report: dict[str, Any]) -> str:
    """The report of benchmarks/export_scale.py as a Markdown table and the machine it ran on."""
    layouts, targets = report["layouts"], report["targets"]
    rows = [
        ["", *(_LAYOUTS[layout["layout"]] for layout in layouts), "target"],
        ["---", *("---:" for _ in layouts), "---:"],
        [
            "time, imports included",
            *(f"{layout['seconds']:.0f} s" for layout in layouts),
            f"under {targets['seconds']:.0f} s",
        ],
        [
            "peak resident memory",
            *(_megabytes(layout["peak_bytes"]) for layout in layouts),
            f"under {_megabytes(targets['peak_bytes'])}",
        ],
        [
            "written to the disk",
            *(_megabytes(layout["written_bytes"]) for layout in layouts),
            f"under {_megabytes(targets['written_bytes'])}",
        ],
        [
            "weights, linked and not read",
            *(f"{layout['weight_bytes'] / 1e9:.1f} GB" for layout in layouts),
            "",
        ],
    ]
    machine = report["machine"]
    packages = machine["packages"]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    memory = machine["memory_bytes"] / 2**30
    return (
        f"{table}\n\n"
        "Measured by [benchmarks/export_scale.py](benchmarks/export_scale.py) on\n"
        f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB,\n"
        f"{machine['system']}, Python {machine['python']}, PyTorch {packages['torch']}.\n"
        "The weights are zeros in a sparse file: this measures the export, not a disk.\n"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def fill(page: str, table: str) -> str:
    """`page` with what stands between the marks replaced by `table`.

    Raises `ValueError` where the page does not have the marks exactly once.
    """
    filled, count = _BLOCK.subn(lambda _: table, page)
    if count != 1:
        raise ValueError(f"the page has {count} blocks marked export_scale; it must have one")
    return filled


if __name__ == "__main__":
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(fill(README.read_text(encoding="utf-8"), render(report)), encoding="utf-8")
