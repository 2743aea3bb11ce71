"""One step of each stage, and the formulas that the stages stand on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.checkpoint import open_checkpoint
from exporters.synthetic.small_tokenizers import TokenizerSizes, write_tokenizers
from exporters.training import decoder, few_steps, flow, guidance, path, vae
from exporters.training.checkpoint import write_checkpoint
from exporters.training.data import draw_batch, draw_windows, labels, to_tensor
from exporters.training.data import pack as pack_latents
from exporters.training.loop import Draw
from exporters.training.networks import TEXT_LENGTH, TextEncoders, make_transformer, velocity
from exporters.training.text import CaptionReader, TextStage, facts
from fluxdeploy.build.checkpoint import check_family
from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.demo.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Drawing,
    Placed,
    Scene,
    Thing,
    arrange,
    caption,
    draw,
    is_held_out,
    sample_scene,
)
from fluxdeploy.sampling.latents import pack

CPU = torch.device("cpu")
SIZE = (96, 128)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizerSizes]:
    folder = tmp_path_factory.mktemp("tokenizers")
    rng = np.random.default_rng(0)
    return folder, write_tokenizers(folder, [caption(sample_scene(rng), rng) for _ in range(500)])


@pytest.fixture
def text(tokenizers: tuple[Path, TokenizerSizes]) -> TextEncoders:
    torch.manual_seed(0)
    return TextEncoders(*tokenizers)


@pytest.fixture
def reader(text: TextEncoders) -> CaptionReader:
    return CaptionReader(text)


@pytest.fixture
def transformer() -> Any:
    """A transformer whose zeroed linears are random, so that every input matters."""
    torch.manual_seed(0)
    made = make_transformer(guidance_embedding=False)
    return randomised(made)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> flow.LatentSet:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(8)]
    latents = torch.from_numpy(rng.standard_normal((8, 48, 64), dtype=np.float32))
    marks = [labels(arrange(scene, *SIZE, rng)) for scene in scenes]
    for module in (flow, path):
        monkeypatch.setattr(module, "draw_size", lambda rng: SIZE)
    return flow.LatentSet(
        {SIZE: latents}, {SIZE: torch.from_numpy(np.stack(marks))}, {SIZE: scenes}
    )


class Answer(nn.Module):
    """Stands for a transformer: remembers what it was given, and answers with one number."""

    inner_dim = 192

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.single_transformer_blocks = nn.ModuleList([Middle() for _ in range(5)])
        self.seen: dict[str, Tensor] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.seen = inputs
        x = inputs["hidden_states"]
        for block in self.single_transformer_blocks:
            block(x)
        return (self.value.expand(x.shape),)


class Middle(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(*x.shape[:2], 192)


def randomised(network: Any) -> Any:
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network


def learns(networks: nn.ModuleDict, terms: Mapping[str, Tensor]) -> set[str]:
    """Names of parameters that a step would change."""
    total = sum(terms.values(), torch.zeros(()))
    assert torch.isfinite(total)
    total.backward()
    return {
        name
        for name, parameter in networks.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


def step(seed: int = 0) -> Draw:
    return Draw.of(seed, "test", 0)


def test_a_step_of_the_vae_teaches_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    stage = vae.VaeStage(vae.make_vae(), batch=2, device=CPU)
    terms = stage.loss(step())
    assert set(terms) == {"difference", "square", "divergence", "reading"}
    learnt = learns(stage.networks, terms)
    names = {name for name, _ in stage.networks.named_parameters()}
    # A softmax does not see the bias of its keys.
    assert all("to_k.bias" in name for name in names - learnt)


def test_a_step_of_the_decoder_teaches_it_and_leaves_the_encoder() -> None:
    torch.manual_seed(0)
    coder = vae.make_vae().requires_grad_(False)
    stage = decoder.DecoderStage(coder, batch=2, device=CPU)
    terms = stage.loss(step())
    assert set(terms) == {"difference", "square"}
    learnt = learns(stage.networks, terms)
    names = {name for name, _ in stage.networks.named_parameters()}
    assert all("to_k.bias" in name for name in names - learnt)
    assert all(name.startswith("decoder.") for name in names)
    assert not any(parameter.requires_grad for parameter in coder.encoder.parameters())


def test_the_decoder_of_the_vae_sees_noise_as_strong_as_the_latents_ask_for() -> None:
    """Twice the latents get twice the noise, so that strength alone does not drown it."""
    strengths = []
    for factor in (1.0, 2.0):
        coder = Coder(factor)
        stage = vae.VaeStage(coder, batch=4, device=CPU)  # type: ignore[arg-type]
        stage.loss(step())
        strengths.append((coder.decoded - coder.mean).std())
    torch.testing.assert_close(strengths[1], 2 * strengths[0], rtol=0.01, atol=0)
    assert 0.15 < strengths[0] < 0.45


class Coder(nn.Module):
    """Stands for an autoencoder: latents of a known strength, and almost no spread of its own."""

    config = SimpleNamespace(latent_channels=16)

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def encode(self, images: Tensor) -> Any:
        b, _, height, width = images.shape
        generator = torch.Generator().manual_seed(0)
        self.mean = self.strength * torch.randn(b, 16, height // 8, width // 8, generator=generator)
        logvar = torch.full_like(self.mean, -30)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.mean, logvar=logvar))

    def decode(self, latents: Tensor) -> Any:
        self.decoded = latents
        return SimpleNamespace(
            sample=torch.zeros(len(latents), 3, *(8 * s for s in latents.shape[2:]))
        )


def test_windows_have_the_labels_of_their_place() -> None:
    rng = np.random.default_rng(2)
    windows, marks = draw_windows(rng, 8)
    assert windows.shape == (16, 64, 64, 3)
    assert marks.shape == (16, 16, 6)
    colours = np.array(list(COLOURS.values()))
    covered, flat = 0, list[bool]()
    for window, found in zip(windows, marks, strict=True):
        quarters = window.reshape(4, 2, 8, 4, 2, 8, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        quarters = quarters.reshape(16, 4, 64, 3)
        for token, (_, colour, *shares) in zip(quarters, found, strict=True):
            for quarter, share in zip(token, shares, strict=True):
                if share == 255:
                    # A share is rounded: the outline may still cross a corner.
                    assert np.abs(quarter - colours[int(colour) - 1]).mean() < 1
                    covered += 1
        empty = quarters[found[:, 0] == 0].reshape(-1, 256, 3)
        flat += [bool((token == token[0]).all()) for token in empty]
    assert covered > 20
    # A thing may cover a fiftieth of a token that has no label.
    assert np.mean(flat) > 0.75


def test_a_step_of_the_flow_teaches_the_transformer_and_both_text_encoders(
    transformer: Any, text: TextEncoders, reader: CaptionReader, data: flow.LatentSet
) -> None:
    stage = flow.FlowStage(transformer, text, reader, data, batch=4, device=CPU)
    learnt = learns(stage.networks, stage.loss(step()))
    for part in ("transformer.proj_out", "transformer.x_embedder", "text.t5.shared", "text.clip"):
        assert any(name.startswith(part) for name in learnt), part


def test_the_flow_aims_from_data_to_noise(
    text: TextEncoders, reader: CaptionReader, data: flow.LatentSet
) -> None:
    """The target is x_1 - x_0, and the transformer sees (1 - t) x_0 + t x_1."""
    answer = Answer(0.7)
    loss = flow.FlowStage(answer, text, reader, data, batch=4, device=CPU).loss(step())["flow"]
    again = step()
    batch = data.batch(again, 4, CPU)
    again.scenes.random(4)
    t = torch.sigmoid(1.2 * again.normal(4) + 1.2)
    noise = again.normal(*batch.latents.shape)
    torch.testing.assert_close(loss, (0.7 - (noise - batch.latents)).square().mean())
    share = t[:, None, None]
    torch.testing.assert_close(
        answer.seen["hidden_states"], batch.latents + share * (noise - batch.latents)
    )
    torch.testing.assert_close(answer.seen["timestep"], t)
    assert batch.size == SIZE


def test_the_reader_is_asked_what_lies_where(
    text: TextEncoders, reader: CaptionReader, data: flow.LatentSet
) -> None:
    """A reader whose biases give the true answers for a picture of one kind has no loss."""
    empty = flow.LatentSet(data.latents, {SIZE: torch.zeros_like(data.labels[SIZE])}, data.scenes)
    stage = flow.FlowStage(Answer(0.0), text, reader, empty, batch=2, device=CPU)
    linear = stage.reader.linear
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.fill_(-20)
        linear.bias[[0, 1 + len(SHAPES)]] = 20
    assert stage.loss(step())["reading"] < 1e-6
    with torch.no_grad():
        linear.bias[1] = 60
    assert stage.loss(step())["reading"] > 1


def test_labels_say_what_lies_in_each_token() -> None:
    ring, heart = Thing("red", "ring"), Thing("pink", "heart")
    drawing = Drawing(96, 128, "gray", (Placed(ring, 32, 32, 30), Placed(heart, 112, 80, 12)))
    marks = labels(drawing).reshape(6, 8, 6)
    assert marks[0, 1].tolist()[:2] == [1 + SHAPES.index("ring"), 1 + list(COLOURS).index("red")]
    assert marks[5, 7].tolist()[:2] == [1 + SHAPES.index("heart"), 1 + list(COLOURS).index("pink")]
    assert not marks[5, 0].any()
    # Quarters of a token: top left, top right, bottom left, bottom right.
    hole, edge = marks[1, 1, 2:], marks[0, 0, 2:]
    assert hole[3] == 0
    assert edge[0] < edge[3]
    picture = draw(Drawing(96, 128, "white", (Placed(Thing("blue", "circle"), 64, 48, 20),)))
    drawn = (picture != picture[0, 0]).any(-1).reshape(6, 16, 8, 16).any((1, 3))
    found = labels(Drawing(96, 128, "white", (Placed(Thing("blue", "circle"), 64, 48, 20),)))
    assert (drawn.ravel() >= (found[:, 0] > 0)).all()


def test_captions_are_dropped_now_and_then_with_all_that_they_say(
    text: TextEncoders, data: flow.LatentSet
) -> None:
    prompts: list[str] = []
    asked: list[Tensor] = []

    class Listening(nn.Module):
        def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
            prompts.extend(texts)
            return torch.zeros(len(texts), TEXT_LENGTH, 128), torch.zeros(len(texts), 96)

    class Asking(nn.Module):
        def loss(self, states: tuple[Tensor, Tensor], said: Tensor) -> Tensor:
            asked.append(said)
            return torch.zeros(())

    stage = flow.FlowStage(Answer(0.0), Listening(), Asking(), data, batch=400, device=CPU)  # type: ignore[arg-type]
    stage.loss(step())
    assert 20 < prompts.count("") < 65
    assert len(set(prompts)) > 10
    assert [not said.any() for said in asked[0]] == [not prompt for prompt in prompts]


def test_facts_are_in_the_order_of_the_words_and_in_that_of_the_picture() -> None:
    star, ring = Thing("pink", "star", "large"), Thing("red", "ring")
    said_star = [1 + list(COLOURS).index("pink"), 1 + SHAPES.index("star"), 2]
    said_ring = [1 + list(COLOURS).index("red"), 1 + SHAPES.index("ring"), 0]
    for relation, swapped in (("above", 0), ("below", 1), ("left of", 0), ("right of", 1)):
        found = facts(Scene((star, ring), relation, background="black")).tolist()
        assert found[:6] == said_star + said_ring
        assert found[6:12] == (said_ring + said_star if swapped else said_star + said_ring)
        assert found[12:] == [1 + list(RELATIONS).index(relation), 0, 3]
    assert facts(Scene((star, ring))).tolist()[6:] == [*said_star, *said_ring, 0, 0, 0]
    alone = facts(Scene((ring,), place="at the bottom")).tolist()
    assert alone == [*said_ring, 0, 0, 0, *said_ring, 0, 0, 0, 0, 3, 0]


def test_the_text_stage_teaches_every_state_the_facts(text: TextEncoders) -> None:
    stage = TextStage(text, batch=8, device=CPU)
    learnt = learns(stage.networks, stage.loss(step()))
    for part in ("text.t5.shared", "text.clip", "reader.states", "reader.pooled"):
        assert any(name.startswith(part) for name in learnt), part
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(4)]
    said = torch.from_numpy(np.stack([facts(scene) for scene in scenes]))
    states, pooled = text([caption(scene) for scene in scenes])
    whole = stage.reader.loss((states, pooled), said)
    last = torch.cat([torch.zeros_like(states[:, :-1]), states[:, -1:]], 1)
    assert stage.reader.loss((last, pooled), said) != whole
    assert stage.reader.loss((states, 0 * pooled), said) != whole


def test_a_new_guidance_embedding_changes_nothing(
    transformer: Any, text: TextEncoders, data: flow.LatentSet
) -> None:
    student = guidance.guided_student(transformer)
    x, t, states = torch.randn(2, 48, 64), torch.tensor([0.3, 0.9]), text(["a red circle", ""])
    expected = velocity(transformer, x, t, states, SIZE)
    assert expected.std() > 0.01
    for scale in (1.0, 5.0):
        actual = velocity(student, x, t, states, SIZE, torch.full((2,), scale))
        torch.testing.assert_close(actual, expected)


def test_a_step_of_the_guidance_teaches_the_student_alone(
    transformer: Any, text: TextEncoders, data: flow.LatentSet
) -> None:
    student = guidance.guided_student(transformer)
    stage = guidance.GuidanceStage(student, transformer, text, data, batch=4, device=CPU)
    learnt = learns(stage.networks, stage.loss(step()))
    assert any("guidance_embedder" in name for name in learnt)
    frozen = [*transformer.parameters(), *text.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def test_the_guidance_target_is_classifier_free_guidance(
    transformer: Any, text: TextEncoders, data: flow.LatentSet
) -> None:
    student = guidance.guided_student(transformer)
    stage = guidance.GuidanceStage(student, transformer, text, data, batch=3, device=CPU)
    loss = stage.loss(step())["guidance"]
    again = step()
    batch = data.batch(again, 3, CPU)
    t, _, x = flow.noised(batch.latents, again)
    scale = (1 + 5 * again.uniform(3))[:, None, None]
    towards = velocity(transformer, x, t, text(batch.captions), SIZE)
    away = velocity(transformer, x, t, text([""] * 3), SIZE)
    # The fresh student is the teacher with the prompt: it is off by (w - 1) (v_prompt - v_empty).
    torch.testing.assert_close(loss, ((scale - 1) * (towards - away)).square().mean())


def test_the_model_without_guidance_embedding_starts_as_the_guided_one(
    transformer: Any, text: TextEncoders
) -> None:
    dev = randomised(guidance.guided_student(transformer))
    schnell = few_steps.unguided_student(dev)
    x, t, states = torch.randn(2, 48, 64), torch.tensor([0.3, 0.9]), text(["a red circle", ""])
    scale = torch.full((2,), few_steps.GUIDANCE)
    expected = velocity(dev, x, t, states, SIZE, scale)
    torch.testing.assert_close(velocity(schnell, x, t, states, SIZE), expected)
    other = velocity(dev, x, t, states, SIZE, scale + 2)
    assert (other - expected).abs().max() > 1e-3


def test_a_step_of_path_covers_every_piece_at_any_guidance(
    transformer: Any, text: TextEncoders, data: flow.LatentSet
) -> None:
    teacher = randomised(guidance.guided_student(transformer))
    dev = copy.deepcopy(teacher)
    terms = path.PathStage(dev, teacher, text, batch=2, device=CPU).loss(step())
    assert list(terms) == [f"piece {number}" for number in range(1, 5)]
    assert all(term > 0 for term in terms.values())
    learnt = learns(nn.ModuleDict({"transformer": dev}), terms)
    assert any("guidance_embedder" in name for name in learnt)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_step_of_few_steps_covers_four_pieces_at_one_guidance(
    transformer: Any, text: TextEncoders, data: flow.LatentSet
) -> None:
    dev = randomised(guidance.guided_student(transformer))
    schnell = few_steps.unguided_student(dev)
    stage = few_steps.few_steps_stage(schnell, dev, text, batch=2, device=CPU)
    terms = stage.loss(step())
    assert len(terms) == 4
    assert all(term > 0 for term in terms.values())
    learnt = learns(stage.networks, terms)
    assert any("single_transformer_blocks.4" in name for name in learnt)
    assert all(parameter.grad is None for parameter in dev.parameters())


def test_few_steps_begin_where_the_host_begins_them() -> None:
    levels = path.shifted_levels(few_steps.SHIFT)
    torch.testing.assert_close(torch.tensor(levels), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_a_piece_begins_where_the_student_arrived(text: TextEncoders, data: flow.LatentSet) -> None:
    student = Answer(0.3)
    few_steps.few_steps_stage(student, Answer(0.7), text, batch=2, device=CPU).loss(step())
    noise = step().normal(2, SIZE[0] * SIZE[1] // 256, 64)
    # The last of four pieces begins at 0.5.
    torch.testing.assert_close(student.seen["hidden_states"], noise - (1 - 0.5) * 0.3)


@pytest.mark.parametrize("make", [path.PathStage, few_steps.few_steps_stage])
def test_a_teacher_on_a_straight_path_is_met_at_once(
    text: TextEncoders, data: flow.LatentSet, make: Any
) -> None:
    stage = make(Answer(0.7), Answer(0.7), text, batch=2, device=CPU)
    for term in stage.loss(step()).values():
        torch.testing.assert_close(term, torch.zeros(()), atol=1e-9, rtol=0)


def test_training_never_draws_what_is_held_out() -> None:
    _, scenes, _ = draw_batch(np.random.default_rng(0), 500, SIZE)
    assert not any(is_held_out(scene) for scene in scenes)


def test_packing_is_the_hosts() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 16, 12, 8), dtype=np.float32)
    packed = pack_latents(torch.from_numpy(latents)).numpy()
    spec = LatentSpec(16, 2, 8, scaling_factor=1.0, shift_factor=0.0)
    np.testing.assert_array_equal(packed, pack(latents, spec))


def test_pictures_become_tensors_between_minus_one_and_one() -> None:
    picture = np.zeros((1, 2, 3, 3), np.uint8)
    picture[0, 1, 2] = (0, 255, 51)
    tensor = to_tensor(picture)
    assert tensor.shape == (1, 3, 2, 3)
    torch.testing.assert_close(tensor[0, :, 1, 2], torch.tensor([-1.0, 1.0, -0.6]))


def test_every_caption_fits_into_the_text_length(text: TextEncoders) -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        ids = text._t5_tokenizer.loaded(caption(sample_scene(rng), rng)).input_ids
        assert len(ids) <= TEXT_LENGTH


def test_a_written_checkpoint_opens_as_flux(
    transformer: Any, text: TextEncoders, tokenizers: tuple[Path, TokenizerSizes], tmp_path: Path
) -> None:
    dev = guidance.guided_student(transformer)
    untrained = vae.make_vae()
    untrained.register_to_config(shift_factor=0.0)
    parts = (untrained, text, dev)
    settings = {"num_inference_steps": 28, "guidance_scale": 3.0}
    write_checkpoint(
        tmp_path / "dev", tokenizers[0], *(copy.deepcopy(part) for part in parts), settings
    )
    checkpoint = open_checkpoint(tmp_path / "dev")
    check_family(checkpoint)
    assert checkpoint.transformer.guidance_embedding
    assert checkpoint.transformer.axes_dims == (8, 12, 12)
