"""The training loop: seeded, resumable, and honest about a run that diverges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporters.training import loop
from exporters.training.loop import Draw, Recipe, plot_losses, train, write_record
from fluxdeploy.progress import Progress

RECIPE = Recipe("toy", steps=60, rate=5e-2, matrix_rate=5e-2, warmup=5)
CPU = torch.device("cpu")


class Stop(Exception):
    """A run that is cut off."""


class Toy:
    """A regression on random numbers; its names make Muon and AdamW share the work."""

    def __init__(self, stop_at: int | None = None) -> None:
        torch.manual_seed(1)
        blocks = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
        self.networks = nn.ModuleDict({"transformer_blocks": blocks})
        self.stop_at, self.calls = stop_at, 0

    def loss(self, draw: Draw) -> dict[str, Tensor]:
        if self.calls == self.stop_at:
            raise Stop
        self.calls += 1
        x = draw.normal(16, 8)
        predicted = self.networks["transformer_blocks"](x).float()
        return {"square": (predicted[:, 0] - x.sum(1)).square().mean()}

    def train(self, folder: Path, recipe: Recipe = RECIPE, seed: int = 0) -> dict[str, Tensor]:
        with Progress(quiet=True) as progress:
            train(recipe, self.networks, self.loss, folder, seed, CPU, progress)
        return self.networks.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_was_cut_off_ends_with_the_same_weights_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = Toy().train(whole)
    with pytest.raises(Stop):
        Toy(stop_at=25).train(parts)  # the state of step 20 is on the disk
    monkeypatch.setattr(loop, "_SAVE_EVERY", 1e9)
    with pytest.raises(Stop):
        Toy(stop_at=30).train(parts)  # the log has step 40, the disk still the state of step 20
    last = Toy()
    actual = last.train(parts)
    assert last.calls == 40
    assert same(expected, actual)
    logs = [(folder / "toy.jsonl").read_text().splitlines() for folder in (whole, parts)]
    losses = [
        [(json.loads(line)["step"], json.loads(line)["square"]) for line in log] for log in logs
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [20, 40, 60]


def test_a_finished_stage_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    expected = Toy().train(tmp_path)
    again = Toy()
    assert same(expected, again.train(tmp_path))
    assert again.calls == 0
    assert not (tmp_path / "toy.state.pt").exists()


def test_the_seed_decides(tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        results.append(Toy().train(tmp_path / name, seed=seed))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_the_loss_goes_down(tmp_path: Path) -> None:
    Toy().train(tmp_path, dataclasses.replace(RECIPE, steps=300))
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert lines[-1]["square"] < 0.3 * lines[0]["square"]


def test_weights_that_are_no_numbers_stop_the_run(tmp_path: Path) -> None:
    toy = Toy()
    toy.loss = lambda draw: {
        "square": draw.normal(1).sum() * torch.nan * next(toy.networks.parameters()).sum()
    }  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="toy diverged at step 20"):
        toy.train(tmp_path)
    assert not (tmp_path / "toy.pt").exists()


def test_muon_gets_the_matrices_of_blocks_alone() -> None:
    networks = nn.ModuleDict(
        {
            "transformer_blocks": nn.ModuleDict({"ff": nn.Linear(4, 4), "norm1": nn.Linear(4, 4)}),
            "embedder": nn.Linear(4, 4),
        }
    )
    adam, muon = loop._optimizers(RECIPE, networks)
    assert isinstance(muon, torch.optim.Muon)
    (matrix,) = muon.param_groups[0]["params"]
    assert matrix is networks["transformer_blocks"]["ff"].weight
    assert len(adam.param_groups[0]["params"]) == 5


def test_the_losses_are_plotted_and_recorded(tmp_path: Path) -> None:
    Toy().train(tmp_path)
    plot_losses(tmp_path, ["toy"])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    write_record(tmp_path, ["toy"], CPU)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["device"]
    assert record["cores"] >= 1
    assert record["stages"]["toy"]["steps"] == 60
    assert set(record["stages"]["toy"]["losses"]) == {"square"}
