"""Launches as an engine's file has them, and the tiles of its products."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from engines.native.specs import linear_spec
from engines.native.tiles import Tile, choose_tiles
from engines.native.works import read_works, schedule, works_metadata
from fluxdeploy.errors import EngineError
from tests.engines.native.test_run import kernel_of
from tests.support.native_file import SMALL_PLAN


def metadata() -> dict[str, str]:
    specs = [spec for work in schedule(SMALL_PLAN) for spec in work.specs]
    return works_metadata(SMALL_PLAN, {spec.name: kernel_of(spec) for spec in specs})


def test_what_was_written_is_read() -> None:
    works = read_works(SMALL_PLAN, metadata())
    assert [work.steps for work in works] == [work.steps for work in schedule(SMALL_PLAN)]
    assert [[k.name for k in work.kernels] for work in works] == [
        [spec.name for spec in work.specs] for work in schedule(SMALL_PLAN)
    ]


def changed(what: str, change: Callable[[Any], None]) -> dict[str, str]:
    found = metadata()
    value = json.loads(found[what])
    change(value)
    return found | {what: json.dumps(value)}


def of_all_kernels(name: str, value: Any) -> dict[str, str]:
    def change(kernels: Any) -> None:
        for kernel in kernels.values():
            kernel[name] = value

    return changed("kernels", change)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        metadata() | {"parameters": "another"},
        {name: text for name, text in metadata().items() if name != "kernels"},
        metadata() | {"works": "[" * 100_000},
        changed("works", lambda works: works.pop()),
        changed("works", lambda works: works.insert(0, [3, works.pop(0)[1]])),
        changed("works", lambda works: works[0].__setitem__(1, ["nothing"])),
        changed("works", lambda works: works[0].__setitem__(1, [])),
        changed("works", lambda works: works[0].__setitem__(0, -1)),
        of_all_kernels("function", "rope"),
        of_all_kernels("tile", [0, 0]),
        of_all_kernels("tile", ["a", None]),
        of_all_kernels("threads", "many"),
        of_all_kernels("threads", 1 << 20),
        of_all_kernels("shared", -1),
        of_all_kernels("programs", 0),
        of_all_kernels("boxes", []),
    ],
    ids=range(17),
)
def test_launches_that_a_gpu_would_misread_are_refused(broken: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="Build it again"):
        read_works(SMALL_PLAN, broken)


def test_a_tile_without_rope_is_no_choice_for_it() -> None:
    tile = Tile(128, 256, 8, 3)
    with pytest.raises(ValueError, match="no RoPE"):
        linear_spec("fp8", "fp8", "fp8", 1792, 256, "split", 768, False, True, True, tile)


@pytest.mark.parametrize("epilogue", ["plain", "split", "gelu", "residual"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("width", [96, 640, 1920, 3072])
def test_tiles_divide_what_they_are_for(width: int, kind: Any, epilogue: str) -> None:
    split = 3 * width if epilogue == "split" else 0
    for columns in (width, 4 * width, split + 4 * width):
        for tile in choose_tiles(kind, columns, width, epilogue, split):
            half = tile.columns if tile.form else tile.columns // 2
            assert split % half == 0
            assert columns % tile.columns == 0 or tile == Tile(128, 64, 4, 4)
    assert choose_tiles("bf16", 1920, 1920, "plain", 0)[0].form == "pingpong"
