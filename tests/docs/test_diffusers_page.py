"""docs/diffusers.md lists every argument of diffusers' pipelines, and says what is here."""

from __future__ import annotations

import inspect
import re

import pytest

from fluxdeploy import FluxPipeline
from fluxdeploy.host.diffusers_names import ARGUMENTS
from tests.docs.pages import ROOT

diffusers = pytest.importorskip("diffusers")

IN_ORDER = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
PIPELINES = (
    *IN_ORDER,
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlNetPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
    "FluxKontextPipeline",
    "FluxPriorReduxPipeline",
)
OURS = inspect.signature(FluxPipeline.__call__).parameters


def arguments(name: str) -> list[str]:
    return list(inspect.signature(getattr(diffusers, name).__call__).parameters)[1:]


def rows() -> dict[str, str]:
    text = (ROOT / "docs" / "diffusers.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))


def test_the_table_has_every_argument_of_diffusers() -> None:
    assert set(rows()) == {each for name in PIPELINES for each in arguments(name)}


def test_what_is_not_here_is_refused_with_the_sentence_of_the_table() -> None:
    for name, said in rows().items():
        assert said.startswith("no:") == (name not in OURS), name
        if name not in OURS:
            assert said == f"no: {ARGUMENTS[name]}", name


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_may_be_given_without_a_name_has_diffusers_order(name: str) -> None:
    ours = [each for each, of in OURS.items() if of.kind is of.POSITIONAL_OR_KEYWORD][1:]
    assert ours == arguments(name)[: len(ours)]
