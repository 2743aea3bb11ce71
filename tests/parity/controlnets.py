"""The ControlNets of the parity tests."""

from __future__ import annotations

from typing import Any

# By name, the checkpoint and the sizes of each ControlNet beside it.
CASES: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    # Two residuals for three blocks.
    "InstantX": ("constant", ({"double": 2, "single": 1},)),
    "many single blocks, no guidance": ("schnell", ({"double": 1, "single": 2},)),
    "Union": ("dev", ({"double": 1, "single": 2, "modes": 5},)),
    # Of two and one residuals, one is summed.
    "several": (
        "dev",
        ({"double": 2, "single": 1, "modes": 3}, {"double": 1, "single": 1, "seed": 3}),
    ),
    # No single blocks.
    "XLabs": ("constant", ({"double": 2, "single": 0, "hint": 16},)),
}
