"""A bundle held against PyTorch float32: its engines, pictures and layers."""
