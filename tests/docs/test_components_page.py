"""docs/components.md has the tensors of the exported components."""

from __future__ import annotations

from typing import Any

import pytest

from tests.docs.pages import ROOT, section, tables

pytest.importorskip("torch")

from exporters.components.chain import Chain
from exporters.components.mmdit import ONE_PIECE
from exporters.components.pieces import COMPUTE_TYPES
from exporters.components.registry import COMPONENTS
from exporters.models import mmdit
from exporters.synthetic.sparse_checkpoint import FLUX_DEV, Sizes
from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.bundle.manifest import SYMBOLS

PAGE = ROOT / "docs" / "components.md"

FLOAT32 = COMPUTE_TYPES["fp32"]

Tensors = dict[str, list[tuple[str, str, str, tuple[int | str, ...]]]]


@pytest.fixture(scope="module")
def default_model() -> Sizes:
    checkpoint = find_checkpoint(None)
    return Sizes(checkpoint.transformer, checkpoint.vae, checkpoint.clip, checkpoint.t5)


@pytest.fixture(params=[FLUX_DEV, "default"], ids=["FLUX.1-dev", "default model"])
def model(request: pytest.FixtureRequest, default_model: Sizes) -> tuple[Sizes, dict[str, int]]:
    """A model's sizes, and what the page says they are."""
    (table,) = tables(section(PAGE, "# Components"))
    if request.param == "default":
        return default_model, {row[0]: int(row[3]) for row in table}
    return FLUX_DEV, {row[0]: int(row[2]) for row in table}


def page_tensors(heading: str, sizes: dict[str, int]) -> Tensors:
    found: Tensors = {}
    component = ""
    for name, side, tensor, dtype, shape in tables(section(PAGE, heading))[0]:
        component = name or component
        words = shape.strip("[]").split(", ")
        resolved = tuple(
            word if word in SYMBOLS else sizes[word] if word in sizes else int(word)
            for word in words
        )
        found.setdefault(component, []).append((side, tensor, dtype, resolved))
    return found


def chain_tensors(chain: Chain) -> list[tuple[str, str, str, tuple[int | str, ...]]]:
    sides: list[tuple[str, Any]] = [("in", chain.inputs), ("out", chain.outputs)]
    return [(side, t.name, t.dtype, t.shape) for side, specs in sides for t in specs]


def test_the_symbols_for_sizes_are_not_those_of_dynamic_axes(
    model: tuple[Sizes, dict[str, int]],
) -> None:
    assert set(model[1]).isdisjoint(SYMBOLS)


def test_the_tensors_of_a_bundle_are_those_of_the_chains(
    model: tuple[Sizes, dict[str, int]],
) -> None:
    sizes, said = model
    built = [component.chain(sizes, FLOAT32) for component in COMPONENTS.values()]
    expected = {chain.component: chain_tensors(chain) for chain in built}
    assert page_tensors("## Tensors", said) == expected


def test_the_tensors_of_the_one_piece_transformer_are_those_of_its_chain(
    model: tuple[Sizes, dict[str, int]],
) -> None:
    sizes, said = model
    chain = ONE_PIECE.chain(sizes, FLOAT32)
    (tensors,) = page_tensors("## The one-piece transformer", said).values()
    assert tensors == chain_tensors(chain)


def test_the_modulation_rows_are_counted_as_the_page_says() -> None:
    (table,) = tables(section(PAGE, "## Modulation rows"))
    assert [int(row[0].split()[0]) for row in table] == [
        mmdit.DOUBLE_ROWS,
        mmdit.SINGLE_ROWS,
        mmdit.FINAL_ROWS,
    ]
    transformer = FLUX_DEV.transformer
    rows = 12 * transformer.double_blocks + 3 * transformer.single_blocks + 2
    assert rows == transformer.modulation_rows


def test_the_standard_operators_are_those_of_the_opset_that_the_page_names() -> None:
    from exporters.graph.trace import OPSET

    assert f"ONNX opset {OPSET}" in " ".join(PAGE.read_text().split())
