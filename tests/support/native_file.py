"""A small native engine's file, made without its builder: every step, and no sense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.native.file import ALIGNMENT, CUBIN, DTYPES, PADDING, PLAN
from engines.native.plan import (
    Attention,
    Buffer,
    Convert,
    Kind,
    Linear,
    Norm,
    Place,
    Plan,
    Rope,
)
from fluxdeploy.bundle.tensorfile import DTYPE_BITS, TensorFileWriter

WIDTH, HEAD, ROWS = 16, 8, 6
STREAM, NORMED, QKV = Place("stream"), Place("normed8"), Place("qkv")

SMALL_PLAN = Plan(
    WIDTH,
    HEAD,
    ROWS,
    (
        Buffer("hidden_states", "image", WIDTH, "f32"),
        Buffer("context", "text", WIDTH, "f32"),
        Buffer("velocity", "image", WIDTH, "f32"),
        Buffer("stream", "all", WIDTH, "bf16"),
        Buffer("normed8", "all", WIDTH, "fp8"),
        Buffer("qkv", "all", 3 * WIDTH, "bf16"),
        Buffer("qkv8", "all", 3 * WIDTH, "fp8"),
        Buffer("joined8", "all", 3 * WIDTH, "fp8"),
    ),
    (
        Convert(Place("hidden_states"), STREAM, WIDTH, "image"),
        Convert(Place("context"), STREAM, WIDTH, "text"),
        Norm(STREAM, NORMED, "all", (0, 3), (1, 4), (0.5, 0.25)),
        Linear(
            NORMED,
            QKV,
            "all",
            "in.weight",
            "in.bias",
            WIDTH,
            5 * WIDTH,
            "split",
            scale="in.scale",
            out_scale=(0.5, 0.5),
            split=3 * WIDTH,
            second=Place("joined8", WIDTH),
        ),
        Rope(QKV, Place("qkv8"), "norms", 0.5, (0.5, 0.5, 0.25)),
        Attention(Place("qkv8"), Place("joined8"), (0.5, 0.5, 0.25), 1 / 448, 0.5),
        Linear(
            Place("joined8"),
            STREAM,
            "all",
            "out.weight",
            "out.bias",
            3 * WIDTH,
            WIDTH,
            "residual",
            grouped=True,
            scale="out.scale",
            gate=(2, 5),
        ),
        Convert(STREAM, Place("velocity"), WIDTH, "image"),
    ),
    (),
)

SMALL_TENSORS: Mapping[str, tuple[Kind, tuple[int, ...]]] = {
    "in.weight": ("fp8", (5 * WIDTH, WIDTH)),
    "in.bias": ("f32", (5 * WIDTH,)),
    "in.scale": ("f32", (5 * WIDTH,)),
    "norms": ("f32", (4, HEAD)),
    "out.weight": ("fp8", (2 * WIDTH, 3 * WIDTH)),
    "out.bias": ("f32", (2 * WIDTH,)),
    "out.scale": ("f32", (2 * WIDTH,)),
}


def write_small_engine(
    path: Path,
    plan: str = SMALL_PLAN.to_json(),
    tensors: Mapping[str, tuple[Kind, tuple[int, ...]]] = SMALL_TENSORS,
) -> Path:
    """Write a file of zeros with a plan, and one compiled kernel of 3 bytes."""
    declared: list[Any] = []
    for name, (kind, shape) in tensors.items():
        declared.append((name, DTYPES[kind], shape))
        if missing := -(math.prod(shape) * DTYPE_BITS[DTYPES[kind]] // 8) % ALIGNMENT:
            declared.append((f"{PADDING}{name}", "U8", (missing,)))
    declared.append((f"{CUBIN}norm", "U8", (3,)))
    with TensorFileWriter(path, declared, {PLAN: plan, "sm": "90"}) as writer:
        for _, dtype, shape in declared:
            writer.write(bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8))
    return path
