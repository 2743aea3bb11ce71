"""LoRA files of every trainer as one form: low-rank changes of the graphs' linears, in NumPy."""

from fluxdeploy.lora.lora import Change, Linears, Lora, LoraFile, LowRank, parse_lora
from fluxdeploy.lora.read import read_lora

__all__ = ["Change", "Linears", "Lora", "LoraFile", "LowRank", "parse_lora", "read_lora"]
