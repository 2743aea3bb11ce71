"""LoRA files of every trainer as one form: changes of the graphs' linears and norms, in NumPy."""

from fluxdeploy.lora.lora import (
    Change,
    Difference,
    Linears,
    Lora,
    LoraFile,
    LowRank,
    parse_lora,
)
from fluxdeploy.lora.read import read_lora

__all__ = [
    "Change",
    "Difference",
    "Linears",
    "Lora",
    "LoraFile",
    "LowRank",
    "parse_lora",
    "read_lora",
]
