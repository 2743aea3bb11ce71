"""Remembered traces: one chain is told from another by whatever its graph depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from torch import nn

from exporters.checkpoint import open_checkpoint
from exporters.components.chain import Chain
from exporters.components.registry import COMPONENTS
from tests.support.traces import digest


@pytest.fixture(scope="session")
def chains(checkpoint: Callable[..., Path]) -> Callable[[str, str], list[Chain]]:
    """`chains(name, compute)`: those of a random checkpoint, made anew."""

    def make(name: str, compute: str) -> list[Chain]:
        opened = open_checkpoint(checkpoint(name))
        return [component.source(opened, compute)[0] for component in COMPONENTS.values()]

    return make


Chains = Callable[[str, str], list[Chain]]


def test_equal_chains_have_one_digest_and_others_their_own(chains: Chains) -> None:
    made = [("dev", "fp32"), ("dev", "bf16"), ("dev", "fp16"), ("schnell", "fp32")]
    seen = [digest(chain) for each in made for chain in chains(*each)]
    assert seen == [digest(chain) for each in made for chain in chains(*each)]
    assert len(set(seen)) == len(seen)


def _an_epsilon(module: nn.Module) -> None:
    module.eps *= 10  # type: ignore[operator, assignment]


def _a_setting(module: nn.Module) -> None:
    module.residual = torch.float16  # type: ignore[assignment]


def _a_table(module: nn.Module) -> None:
    module.register_buffer("table", torch.arange(3))


@pytest.mark.parametrize(
    ("component", "kind", "change"),
    [
        ("vae_decoder", "GroupNorm", _an_epsilon),
        ("transformer", "ImageProjection", _a_setting),
        ("clip", "ClipLayer", _a_table),
    ],
)
def test_a_setting_changes_the_digest(
    chains: Chains, component: str, kind: str, change: Callable[[nn.Module], None]
) -> None:
    (chain,) = (chain for chain in chains("dev", "fp32") if chain.component == component)
    before = digest(chain)
    for piece in chain.pieces:
        for module in piece.module.modules():
            if type(module).__name__ == kind:
                change(module)
    assert digest(chain) != before
