"""LoRA files of every trainer as one form: low-rank changes of the graphs' linears, in NumPy."""

from fluxdeploy.lora.lora import Linears, Lora, LowRank
from fluxdeploy.lora.read import read_lora

__all__ = ["Linears", "Lora", "LowRank", "read_lora"]
