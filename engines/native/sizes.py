"""What the native kernels can have, known before any of them is read."""

from __future__ import annotations

__all__ = ["HEADS", "PROCESSES", "SHARED", "SPLIT"]

HEADS = (16, 32, 64, 128)
"""Channels of a head."""

SPLIT = 32
"""What divides the width of a transformer: half of the smallest tile of a product."""

SHARED = 232_448
"""Bytes of shared memory that a program of a Hopper GPU can have."""

PROCESSES = 8
"""That compile kernels side by side, at most."""
