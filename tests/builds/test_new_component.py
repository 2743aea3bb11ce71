"""A bundle may have more components than FLUX.1's, and fewer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from engines import open_engine
from exporters.components import registry
from exporters.components.chain import Chain, Stage
from exporters.components.component import Component, Networks
from exporters.components.pieces import ComputeType, floats, make_piece, value_of
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from fluxdeploy.host.pipeline import FluxPipeline
from tests.conftest import build_bundle

if TYPE_CHECKING:
    from tests.support.traces import Traces

Checkpoints = Callable[..., Path]


class FirstConvolution(torch.nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.conv_in(latents.to(self.conv_in.weight.dtype)).float()
        return features


def _chain(networks: Networks, compute: ComputeType) -> Chain:
    vae = networks.vae
    latents = floats("latents", "B", vae.latent_channels, "h", "w")
    features = floats("features", "B", vae.channels[-1], "h", "w")
    piece = make_piece(
        lambda: FirstConvolution(vae.latent_channels, vae.channels[-1]), compute, value_of(latents)
    )
    stage = Stage(piece, ("latents",), ("features",), "decoder.")
    return Chain("first_look", (latents,), (features,), (stage,))


FIRST_LOOK = Component(
    name="first_look",
    part="vae",
    chain=_chain,
    activations=lambda networks, sizes, kernels, element: 1000 * sizes.image,
    turn="decode",
)
"""The decoder's first convolution alone: all that it takes to have it in a bundle is here."""


def test_a_component_that_is_declared_is_planned_built_checked_and_run(
    tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = set(registry.COMPONENTS)
    monkeypatch.setitem(registry.COMPONENTS, FIRST_LOOK.name, FIRST_LOOK)  # type: ignore[arg-type]
    planned = CliRunner().invoke(main, ["plan", "--out", str(tmp_path / "bundle"), "--json"])
    assert planned.exit_code == 0, planned.output
    parts = {part["name"]: part for part in json.loads(planned.stdout)["components"]}
    assert parts["first_look"]["parameters"] > 0
    build_bundle(BuildRequest(), tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    assert set(bundle.manifest.components) == {*usual, "first_look"}
    assert "first_look" in traces.components
    with open_engine(bundle, "first_look") as engine:
        channels = bundle.manifest.latents.channels
        (features,) = engine.run({"latents": np.ones((1, channels, 4, 6), np.float32)}).values()
    assert features.shape[2:] == (4, 6)
    verified = CliRunner().invoke(main, ["verify", "--bundle", str(bundle.root), "--json"])
    assert verified.exit_code == 0, verified.output
    assert "first_look" in {row["name"] for row in json.loads(verified.stdout)["components"]}


def test_a_checkpoint_whose_vae_has_no_encoder_makes_a_bundle_without_one(
    tmp_path: Path, checkpoints: Checkpoints, demo_bundle: Path, traces: Traces
) -> None:
    source = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    (file,) = (source / "vae").glob("*.safetensors")
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("encoder.")}
    file.unlink()
    save_file(tensors, file)
    build_bundle(BuildRequest(str(source), precision="fp32"), tmp_path / "bundle")
    build_bundle(BuildRequest(str(checkpoints()), precision="fp32"), tmp_path / "whole")
    components = {
        name: set(open_bundle(tmp_path / name).manifest.components) for name in ("bundle", "whole")
    }
    assert components["whole"] - components["bundle"] == {"vae_encoder"}
    pictures = []
    for name in ("bundle", "whole"):
        with FluxPipeline.from_bundle(tmp_path / name) as pipe:
            made = pipe("a red circle", seed=3, num_inference_steps=2, output_type="np")
            pictures.append(np.asarray(made.images))
    assert np.array_equal(*pictures)
