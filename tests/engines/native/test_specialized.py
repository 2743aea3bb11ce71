"""The linear whose warps have different work: that it is given what it takes, and fits."""

from __future__ import annotations

from itertools import product
from math import prod
from types import SimpleNamespace

import pytest

from engines.native.compiler import compile_spec
from engines.native.plan import BYTES, Kind
from engines.native.specs import PARAMETERS, KernelSpec, linear_spec
from engines.native.tiles import Form, Tile

FORMS: tuple[Form, ...] = ("pingpong", "shared")


def spec_of(kind: Kind, epilogue: str, turn: bool, form: Form) -> KernelSpec:
    """A linear of 1024 channels to as many, or to Q, K, V and as many more."""
    split, columns = (768, 1792) if epilogue == "split" else (768 if turn else 0, 1024)
    columns = 768 if turn and epilogue == "plain" else columns
    out: Kind = kind if turn or epilogue == "gelu" else "bf16"
    second = kind if epilogue == "split" else out
    scaled = kind == "fp8"
    tile = Tile(128, 128 if form == "pingpong" else 256, 4, 6, form=form)
    return linear_spec(kind, out, second, columns, 1024, epilogue, split, True, scaled, turn, tile)


SPECS = [
    spec_of(kind, epilogue, turn, form)
    for kind, epilogue, turn, form in product(
        ("fp8", "bf16"), ("plain", "gelu", "split", "residual"), (False, True), FORMS
    )
    if not turn or epilogue in ("plain", "split")
]


def test_it_takes_what_a_launch_gives() -> None:
    linear = pytest.importorskip("engines.native.linear", exc_type=ImportError)
    for spec in SPECS:
        assert linear.specialized.arg_names == [*PARAMETERS["specialized"], *spec.constants]


def test_its_stages_fit_the_shared_memory_and_are_never_one() -> None:
    """One stage alone would be waited for by those that have to give it back."""
    for spec in SPECS:
        boxes, stages = spec.boxes, int(spec.constants["STAGES"])
        assert boxes is not None
        operands = (
            int(spec.constants["TILE_ROWS"]) * 128
            + prod(boxes["weight"]) * BYTES[spec.types["weight"]]
        )
        assert 2 <= stages <= 6
        assert stages * operands <= 232_448 - 16_384


def test_one_compiles_without_a_gpu_for_all_its_warps() -> None:
    pytest.importorskip("triton")
    kernel, cubin = compile_spec(spec_of("bf16", "plain", False, "pingpong"))
    assert cubin.startswith(b"\x7fELF")
    assert kernel.threads == 32 * (4 + 4 + 4)
    assert kernel.shared <= 232_448
    assert [(box.rows, box.columns, box.swizzle) for box in kernel.boxes] == [
        (128, 64, 3),
        (128, 64, 3),
        (128, 64, 3),
        (128, 64, 3),
    ]


@pytest.mark.parametrize("tiles", [1, 7, 48, 66, 67, 131, 132, 133, 144, 396, 432, 500])
@pytest.mark.parametrize("most", [1, 4, 10])
def test_every_step_of_every_tile_is_somebodys(tiles: int, most: int) -> None:
    """As 132 programs take turns: whole tiles first, and one part finishes each of the others."""
    linear = pytest.importorskip("engines.native.linear", exc_type=ImportError)
    programs, steps = 132, 48
    whole = tiles // programs * programs if most > 1 else tiles
    left = tiles - whole
    parts = min(programs // max(left, 1), most)
    task = SimpleNamespace(whole=whole, left=left, parts=parts, PARTS=most, STEPS=steps)
    turns = linear.Task.turns.fn(task)
    done: dict[int, list[int]] = {}
    last_turn = (turns - 1) // programs
    for turn in range(turns):
        tile, part, of, first, last = linear.Task.share.fn(task, turn)
        assert 0 <= part < of <= max(most, 1)
        assert of == 1 or turn // programs == last_turn
        assert of > 1 or (first, last) == (0, steps)
        done.setdefault(tile, []).extend(range(first, last))
    assert done.keys() == set(range(tiles))
    assert all(sorted(found) == list(range(steps)) for found in done.values())
