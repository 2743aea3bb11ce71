"""Plans with their kernels as files, which `flux_plan.py` writes and `gpu_step_worker.py` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.native.plan import Packed, Part, Plan

__all__ = ["PRECISIONS", "load_plan"]

PRECISIONS = ("bf16", "fp8-linears", "fp8")


def load_plan(folder: Path, precision: str) -> tuple[Plan, dict[str, str], dict[str, bytes]]:
    """The plan with what it packs, the metadata of its engine, and its cubins by name."""
    found = json.loads((folder / f"{precision}.json").read_text(encoding="utf-8"))
    packed = tuple(_packed(each) for each in found["packed"])
    cubins = {name: (folder / f"{name}.cubin").read_bytes() for name in found["cubins"]}
    return replace(Plan.from_json(found["plan"]), packed=packed), found["metadata"], cubins


def _packed(found: dict[str, Any]) -> Packed:
    parts = tuple(Part(**part) for part in found["parts"])
    return Packed(found["name"], tuple(found["shape"]), found["kind"], parts)
