"""Fill and Kontext: what the transformer is given is what diffusers gives it, and it learns."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxFillPipeline, FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from exporters.training import pairs as pairs_module
from exporters.training import task as task_module
from exporters.training.checkpoint import read_checkpoint
from exporters.training.fill import FillStage, fold_mask, sample_fill
from exporters.training.kontext import KontextStage, sample_pair
from exporters.training.loop import Draw, Recipe
from exporters.training.networks import TextEncoders, velocity
from exporters.training.pairs import PairSet, encode_packed, make_pairs
from exporters.training.task import TaskStage, train_task
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.demo.assemble import assemble
from fluxdeploy.demo.scenes import SHAPES
from fluxdeploy.progress import Progress

CPU = torch.device("cpu")
SIZE = (96, 128)
TASKS = {"fill": (FillStage, sample_fill), "kontext": (KontextStage, sample_pair)}

Parts = tuple[FluxTransformer2DModel, TextEncoders, AutoencoderKL]


@pytest.fixture(scope="module")
def dev() -> Parts:
    return read_checkpoint(DEMO_CHECKPOINTS["demo:dev"])


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "SIZES", {SIZE: 1})
    monkeypatch.setattr(pairs_module, "draw_size", lambda rng: SIZE)


@pytest.fixture
def make(dev: Parts, one_size: None, tmp_path: Path) -> Any:
    def make(name: str) -> tuple[TaskStage, PairSet]:
        stage, sample = TASKS[name]
        with Progress(quiet=True) as progress:
            file = tmp_path / "pairs.pt"
            pairs = make_pairs(sample, 3, dev[2], file, 0, CPU, progress)
        return stage(copy.deepcopy(dev[0]), dev[1], pairs, 2, CPU), pairs

    return make


class Given(nn.Module):
    """Stands for a transformer: remembers what it was given."""

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.inputs = inputs
        return (inputs["hidden_states"][..., :64],)


def batches(pairs: PairSet) -> Any:
    return pairs.batch(Draw.of(0, "test", 0), 2, CPU)


def test_masks_and_masked_pictures_are_packed_as_diffusers_packs_them(
    dev: Parts, make: Any
) -> None:
    stage, pairs = make("fill")
    stage._transformer = Given()
    batch = batches(pairs)
    pair = sample_fill(np.random.default_rng([0, 0]), *SIZE)
    assert pair.mask is not None
    assert pair.prompt == pairs.prompts[SIZE][0]
    hidden = pair.given[:, pair.mask == 1]
    assert hidden.numel() > 0
    assert not hidden.any()

    x, t = torch.randn(2, 48, 64), torch.full((2,), 0.5)
    stage.velocity(x, t, (torch.zeros(2, 20, 128), torch.zeros(2, 96)), batch)
    given = stage._transformer.inputs["hidden_states"]
    assert batch.masks is not None
    latents = batch.given.reshape(2, 6, 8, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    pipe = SimpleNamespace(
        vae_scale_factor=8,
        _pack_latents=FluxFillPipeline._pack_latents,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)),
    )
    mask, masked = FluxFillPipeline.prepare_mask_latents(
        pipe,
        batch.masks[:, None],
        latents.reshape(2, 16, 12, 16),
        batch_size=2,
        num_channels_latents=16,
        num_images_per_prompt=1,
        height=SIZE[0],
        width=SIZE[1],
        dtype=torch.float32,
        device=CPU,
        generator=None,
    )
    torch.testing.assert_close(given, torch.cat([x, masked, mask], dim=-1))
    torch.testing.assert_close(fold_mask(batch.masks), mask)


def test_the_reference_stands_where_diffusers_puts_it(
    dev: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.training.vae.half_precision", lambda _: nullcontext())
    transformer = Given()
    x, reference = torch.randn(1, 48, 64), torch.randn(1, 48, 64)
    text = (torch.zeros(1, 20, 128), torch.zeros(1, 96))
    answer = velocity(transformer, x, torch.ones(1), text, SIZE, reference=reference)
    torch.testing.assert_close(answer, x)
    image = torch.rand(1, 3, *SIZE) * 2 - 1
    pipe = SimpleNamespace(
        vae=dev[2],
        vae_scale_factor=8,
        latent_channels=16,
        _pack_latents=FluxKontextPipeline._pack_latents,
        _prepare_latent_image_ids=FluxKontextPipeline._prepare_latent_image_ids,
    )
    pipe._encode_vae_image = lambda image, generator: FluxKontextPipeline._encode_vae_image(
        pipe, image, generator
    )
    _, packed, ids, reference_ids = FluxKontextPipeline.prepare_latents(
        pipe, image, 1, 16, *SIZE, torch.float32, CPU, latents=x
    )
    torch.testing.assert_close(encode_packed(dev[2], image), packed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(transformer.inputs["img_ids"], torch.cat([ids, reference_ids]))
    torch.testing.assert_close(
        transformer.inputs["hidden_states"], torch.cat([x, reference], dim=1)
    )


def test_the_middle_is_asked_what_lies_where_in_both_pictures(make: Any) -> None:
    stage, pairs = make("kontext")
    drawn = np.random.default_rng([0, 0])
    pair = sample_pair(drawn, *SIZE)
    assert pair.marks is not None
    torch.testing.assert_close(pairs.tensors[SIZE]["marks"][0], pair.marks)
    batch = batches(pairs)
    before = batch.marks[:, 48:].clone()
    batch.marks[:, :48] = 0
    linear = stage.reader.linear
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(-20)
        linear.bias[[0, 1 + len(SHAPES)]] = 20
    wanted = torch.zeros(2, 48, 64)
    stage._middle = torch.zeros(2, 96, 192)
    assert before.any()
    with torch.no_grad():
        assert stage.terms(wanted, wanted, batch)["reading"] > 0.1
        batch.marks[:, 48:] = 0
        assert stage.terms(wanted, wanted, batch)["reading"] < 1e-6


def test_a_wider_transformer_starts_as_the_one_before(dev: Parts, make: Any) -> None:
    stage, pairs = make("fill")
    x, t = torch.randn(2, 48, 64), torch.full((2,), 0.5)
    with torch.no_grad():
        text = dev[1](["a red circle", "a blue star"])
        before = velocity(dev[0], x, t, text, SIZE, torch.ones(2))
        after = stage.velocity(x, t, text, batches(pairs))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_two_steps_teach_a_task_and_its_checkpoint_opens_in_diffusers(
    dev: Parts, one_size: None, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[TaskStage] = []
    stage_of, sample = TASKS[name]

    class Kept(stage_of):  # type: ignore[misc, valid-type]
        BATCH = 2

        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            stages.append(self)

    monkeypatch.setattr(task_module, "read_checkpoint", lambda path: copy.deepcopy(dev))
    monkeypatch.setattr(task_module, "plot_losses", lambda folder, stages: None)
    recipe = Recipe(name, steps=2, rate=1e-2, matrix_rate=1e-2, warmup=1, ema=0.0)
    train_task(recipe, Kept, sample, 3, tmp_path, 0, CPU)
    assert json.loads((tmp_path / "training.json").read_text())["stages"][name]["steps"] == 2

    (stage,) = stages
    assert ("reading" in (tmp_path / f"{name}.jsonl").read_text()) == (name == "kontext")
    assemble(DEMO_CHECKPOINTS["demo:dev"], tmp_path / name, tmp_path / "checkpoint")
    index = json.loads((tmp_path / "checkpoint" / "model_index.json").read_text())
    assert index["_class_name"] == stage.PIPELINE
    config = json.loads((tmp_path / name / "transformer" / "config.json").read_text())
    assert config["in_channels"] == {"fill": 384, "kontext": 64}[name]
    assert str(DEMO_CHECKPOINTS["demo:dev"]) not in json.dumps(config)
    opened = FluxTransformer2DModel.from_pretrained(
        tmp_path / "checkpoint", subfolder="transformer"
    ).float()
    x, t = torch.randn(2, 48, 64), torch.full((2,), 0.5)
    batch = stage._pairs.batch(Draw.of(0, "test", 0), 2, CPU)
    with torch.no_grad():
        text = dev[1](batch.prompts)
        learnt = stage.velocity(x, t, text, batch)
        stage._transformer = opened
        written = stage.velocity(x, t, text, batch)
        before = velocity(dev[0], x, t, text, SIZE, torch.ones(2))
    # The weights are rounded to bfloat16.
    torch.testing.assert_close(written, learnt, rtol=0, atol=0.05 * float(learnt.std()))
    assert (learnt - before).std() > 0.2 * learnt.std()
