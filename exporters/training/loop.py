"""The training loop of every stage: seeded, resumable, with a log and a loss plot.

A step's randomness comes from the seed, the stage's name and the step alone, so that a run that
was stopped goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxdeploy.machine import describe_cpu
from fluxdeploy.progress import Progress

__all__ = ["Draw", "Recipe", "half_precision", "plot_losses", "save", "train", "write_record"]

_SAVE_EVERY = 180.0
_LOG_EVERY = 20
_INNER = ("transformer_blocks.", ".SelfAttention.", ".DenseReluDense.", ".self_attn.", ".mlp.")


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained. `matrix_rate` is Muon's learning rate, `rate` is AdamW's."""

    name: str
    steps: int
    rate: float
    matrix_rate: float
    warmup: int = 100
    ema: float = 0.998
    clip: float = 1.0


@dataclass(frozen=True)
class Draw:
    """The random numbers of one step: for scenes (NumPy) and for tensors (torch)."""

    scenes: np.random.Generator
    tensors: torch.Generator

    @staticmethod
    def of(seed: int, stage: str, step: int) -> Draw:
        digest = hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()
        number = int.from_bytes(digest[:8], "little") >> 1
        return Draw(np.random.default_rng(number), torch.Generator().manual_seed(number))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.randn(shape, generator=self.tensors)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), float32."""
        return torch.rand(shape, generator=self.tensors)


def train(
    recipe: Recipe,
    networks: nn.ModuleDict,
    loss: Callable[[Draw], dict[str, Tensor]],
    folder: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train `networks` in place and leave them with the moving average of their weights.

    `loss` gives named terms for a step's random numbers; their sum is minimised. The state goes
    into `folder` every few minutes, the finished weights too: a finished stage is only loaded.
    """
    finished, state_file = folder / f"{recipe.name}.pt", folder / f"{recipe.name}.state.pt"
    if finished.exists():
        networks.load_state_dict(torch.load(finished, weights_only=True))
        progress.note(f"{recipe.name}: finished before")
        return
    optimizers = _optimizers(recipe, networks)
    average = {name: tensor.detach().clone() for name, tensor in networks.state_dict().items()}
    start, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        networks.load_state_dict(state["networks"])
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
        progress.note(f"{recipe.name}: goes on after step {start}")

    log = folder / f"{recipe.name}.jsonl"
    _forget_after(log, start)
    parameters = [parameter for group in optimizers for parameter in _parameters(group)]
    task = progress.task(f"Training: {recipe.name}", total=recipe.steps)
    task.advance(start)
    networks.train()
    began = saved_at = time.monotonic()
    sums: dict[str, float] = {}
    for step in range(start, recipe.steps):
        share = _rate(recipe, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * share
        with half_precision(device), _attention(device):
            terms = loss(Draw.of(seed, recipe.name, step))
        total = sum(terms.values(), torch.zeros((), device=device))
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # Early averages forget the random start faster.
        keep = min(recipe.ema, (step + 1) / (step + 10))
        for name, tensor in networks.state_dict().items():
            average[name].lerp_(tensor, 1 - keep)

        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.detach())
        done = step + 1
        now = time.monotonic()
        if done % _LOG_EVERY == 0 or done == recipe.steps:
            count = (done - 1) % _LOG_EVERY + 1
            means = {name: value / count for name, value in sums.items()}
            if not math.isfinite(sum(means.values())):
                raise FloatingPointError(f"{recipe.name} diverged at step {done}: {means}")
            line = {"step": done, "seconds": round(seconds + now - began, 1), **means}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            sums = {}
            if now - saved_at > _SAVE_EVERY:
                state = {
                    "networks": networks.state_dict(),
                    "average": average,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": done,
                    "seconds": seconds + now - began,
                }
                save(state, state_file)
                saved_at = now
        task.advance()
    networks.load_state_dict(average)
    save(average, finished)
    state_file.unlink(missing_ok=True)


def half_precision(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 products where the hardware has them: a CPU without them is slower in it."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On CPUs, plain matrix products: the fused attention's backward is slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _optimizers(recipe: Recipe, networks: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside attention and MLPs, AdamW for all else.

    Muon: K. Jordan and others, 2024; its rate is scaled to AdamW's (J. Liu and others, 2025).
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in networks.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = any(part in name for part in _INNER) and ".norm" not in name
        (matrices if parameter.ndim == 2 and inner else others).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=recipe.matrix_rate,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return made


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _rate(recipe: Recipe, step: int) -> float:
    """Share of the full learning rate: a linear warm-up, then linearly down to nothing."""
    return min((step + 1) / recipe.warmup, 1 - step / recipe.steps)


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of a log that a resumed run will write again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in lines))


def save(state: Any, path: Path) -> None:
    """Write tensors to a file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def write_record(folder: Path, stages: Sequence[str], device: torch.device) -> None:
    """Write `folder/training.json`: each stage's steps, minutes and last losses, and on what."""
    cpu = describe_cpu()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu["name"],
        "cores": cpu["cores"],
        "torch": torch.__version__,
        "stages": {},
    }
    for stage in stages:
        line = _lines(folder, stage)[-1]
        minutes = round(line.pop("seconds") / 60, 1)
        record["stages"][stage] = {"steps": line.pop("step"), "minutes": minutes, "losses": line}
    record["minutes"] = round(sum(stage["minutes"] for stage in record["stages"].values()), 1)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def plot_losses(folder: Path, stages: Sequence[str]) -> None:
    """Draw every stage's log into `folder/losses.png`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = _lines(folder, stage)
        for term in sorted(lines[0].keys() - {"step", "seconds"}):
            axis.plot([line["step"] for line in lines], [line[term] for line in lines], label=term)
        axis.set(title=f"{stage}, {lines[-1]['seconds'] / 60:.0f} min", xlabel="step")
        axis.set_yscale("log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "losses.png", dpi=100)
    pyplot.close(figure)


def _lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
