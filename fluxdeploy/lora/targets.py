"""Which linears of the base a module of a LoRA file is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fluxdeploy.bfl_names import ADDED_QKV, FINAL_ADALN, QKV, graph_names

__all__ = ["Targets"]

_PROCESSOR = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)")


class Targets:
    """Finds the linears of one part by the names that trainers give them."""

    def __init__(self, linears: Iterable[str]) -> None:
        """`linears`: the names in the graphs."""
        self._linears = frozenset(linears)
        self._flat: dict[str, tuple[str, ...]] = {
            name.replace(".", "_"): (name,) for name in self._linears
        }
        if self._linears.issuperset(FINAL_ADALN):
            self._flat["norm_out_linear"] = FINAL_ADALN

    def find(self, module: str, flat: bool) -> tuple[str, ...] | None:
        """The linears whose rows a module has, in their order; None where the base has none such.

        flat: the module's name has underscores in place of dots.
        """
        names = self._flat.get(module) if flat else self._own(module)
        names = names or graph_names(module, flat) or _of_processor(module)
        return names if names is not None and self._linears.issuperset(names) else None

    def _own(self, module: str) -> tuple[str, ...] | None:
        if module == "norm_out.linear":
            return FINAL_ADALN
        return (module,) if module in self._linears else None


def _of_processor(module: str) -> tuple[str, ...] | None:
    """What XLabs' attention processors change: 1 is the picture's stream, 2 the text's."""
    match = _PROCESSOR.fullmatch(module)
    if match is None:
        return None
    kind, index, which, stream = match.groups()
    if kind == "single":
        block = f"single_transformer_blocks.{index}"
        if stream:
            return None
        return tuple(f"{block}.attn.{n}" for n in QKV) if which == "qkv" else (f"{block}.proj_out",)
    attention = f"transformer_blocks.{index}.attn"
    names = {
        ("qkv", "1"): QKV,
        ("qkv", "2"): ADDED_QKV,
        ("proj", "1"): ("to_out.0",),
        ("proj", "2"): ("to_add_out",),
    }.get((which, stream))
    return names and tuple(f"{attention}.{name}" for name in names)
