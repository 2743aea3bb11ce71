"""Quantization: which linears, with which scales, as which bytes, and how the graph says so."""
