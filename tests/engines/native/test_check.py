"""Plans that stay within their buffers, and would still be computed otherwise than they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engines.native.check import check_plan
from engines.native.plan import Buffer, Convert, Linear, Norm, Place, Plan, Rope
from tests.support.native_file import SMALL_PLAN, SMALL_TENSORS, WIDTH


def with_buffer(name: str, **changes: Any) -> Plan:
    buffers = [replace(b, **changes) if b.name == name else b for b in SMALL_PLAN.buffers]
    return replace(SMALL_PLAN, buffers=tuple(buffers))


def with_step(kind: type, **changes: Any) -> Plan:
    """The first step of a kind, changed."""
    steps = list(SMALL_PLAN.steps)
    index = next(i for i, step in enumerate(steps) if type(step) is kind)
    steps[index] = replace(steps[index], **changes)
    return replace(SMALL_PLAN, steps=tuple(steps))


def with_more(*buffers: Buffer) -> Plan:
    return replace(SMALL_PLAN, buffers=(*SMALL_PLAN.buffers, *buffers))


def without(kind: type) -> Plan:
    steps = tuple(step for step in SMALL_PLAN.steps if type(step) is not kind)
    return replace(SMALL_PLAN, steps=steps)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (with_more(Buffer("modulation", "all", WIDTH, "bf16")), "two of its tensors have one name"),
        (with_more(Buffer("in.bias", "all", WIDTH, "bf16")), "two of its tensors have one name"),
        (with_more(Buffer("wide", "all", WIDTH, "f32")), "it keeps wide in f32"),
        (with_more(Buffer("huge", "all", 40_000, "bf16")), "between 1 and 32000"),
        (with_buffer("stream", columns=2 * WIDTH), "a Norm, takes a part of stream"),
        (with_buffer("qkv", columns=4 * WIDTH), "a Rope, takes a part of qkv"),
        (with_buffer("qkv8", columns=4 * WIDTH), "a Rope, takes a part of qkv8"),
        (without(Norm), "reads normed8 before it is written"),
        (without(Rope), "reads qkv8 before it is written"),
        (with_step(Convert, out=Place("context"), rows="text", x=Place("context")), "an input"),
    ],
    ids=range(10),
)
def test_what_kernels_would_compute_otherwise_is_refused(plan: Plan, words: str) -> None:
    check_plan(SMALL_PLAN, SMALL_TENSORS)
    with pytest.raises(ValueError, match=words):
        check_plan(plan, SMALL_TENSORS)


def test_a_gated_product_is_as_wide_as_its_gates() -> None:
    buffers = with_buffer("stream", columns=3 * WIDTH).buffers
    step = SMALL_PLAN.steps[6]
    assert isinstance(step, Linear)
    plan = replace(
        SMALL_PLAN,
        buffers=buffers,
        steps=(
            Convert(Place("hidden_states"), Place("stream"), WIDTH, "image"),
            replace(step, columns=2 * WIDTH, x=Place("joined8")),
        ),
    )
    tensors = SMALL_TENSORS | {
        "out.weight": ("fp8", (4 * WIDTH, 3 * WIDTH)),
        "out.bias": ("f32", (4 * WIDTH,)),
        "out.scale": ("f32", (4 * WIDTH,)),
    }
    with pytest.raises(ValueError, match="not as wide as the gates"):
        check_plan(plan, tensors)
