"""Measured activation ranges, against hooks on diffusers' own pipeline on the same checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from exporters.calibrate.ranges import ActivationRanges, _load_state, measure_ranges
from exporters.calibrate.trajectory import Calibration, default_calibration
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.tensors import StoredTensor
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import CheckpointError, NumericError, UsageError
from fluxdeploy.progress import Progress, Task

TEXT = 12
CALIBRATION = Calibration(
    prompts=("", "a red circle above a blue square on a white background"),
    seed=3,
    sizes=((64, 96), (64, 64), (96, 16)),
    steps=3,
    guidance=2.5,
)
QUICK = dataclasses.replace(CALIBRATION, sizes=((32, 48),))
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DIGEST = "0" * 64


def open_short(folder: Path) -> Checkpoint:
    """A checkpoint whose text is `TEXT` tokens long, which keeps the tests quick."""
    opened = open_checkpoint(folder)
    return dataclasses.replace(opened, settings={"max_sequence_length": TEXT})


def measure(
    checkpoint: Checkpoint, calibration: Calibration = QUICK, state: Path | None = None
) -> ActivationRanges:
    return measure_ranges(checkpoint, DIGEST, calibration, state, Progress(quiet=True))


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_short(checkpoint("dev"))


@pytest.fixture(scope="module")
def quick(opened: Checkpoint) -> ActivationRanges:
    """What an uninterrupted run measures."""
    return measure(opened)


class Observed:
    """The largest magnitudes in diffusers' pipeline: at each linear, of V, and of normed Q and K.

    Of Q and K it is the length of the channel pairs, which RoPE turns and does not change.
    """

    def __init__(self, folder: Path, calibration: Calibration) -> None:
        from tests.support.checkpoints import load_diffusers

        self.largest: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        pipe = load_diffusers(folder)
        for name, module in pipe.transformer.named_modules():
            block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
            if block and (isinstance(module, nn.Linear) or ".attn.norm_" in name):
                module.register_forward_hook(functools.partial(self._see, name))
        for height, width in calibration.sizes:
            pipe(
                list(calibration.prompts),
                height=height,
                width=width,
                num_inference_steps=calibration.steps,
                guidance_scale=calibration.guidance,
                max_sequence_length=TEXT,
                generator=torch.Generator("cpu").manual_seed(calibration.seed),
                output_type="latent",
            )

    def _see(self, name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        attention, _, part = name.partition(".attn.")
        if isinstance(module, nn.Linear):
            self._keep("inputs", name, inputs[0])
        if part in ("to_v", "add_v_proj"):
            self._keep("values", f"{attention}.attn", output)
        if part in ("norm_q", "norm_added_q"):
            pairs = output.unflatten(-1, (-1, 2)).norm(dim=-1)
            self._keep("queries", f"{attention}.attn", pairs * output.shape[-1] ** -0.5)
        if part in ("norm_k", "norm_added_k"):
            pairs = output.unflatten(-1, (-1, 2)).norm(dim=-1)
            self._keep("keys", f"{attention}.attn", pairs)

    def _keep(self, kind: str, name: str, values: torch.Tensor) -> None:
        self.largest[kind][name] = max(self.largest[kind][name], values.abs().max().item())

    def without_modulation(self) -> dict[str, float]:
        """The inputs of all linears but AdaLN's, which are no part of the transformer's steps."""
        return {n: v for n, v in self.largest["inputs"].items() if ".norm" not in n}


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_ranges_are_what_diffusers_pipeline_shows(
    checkpoint: Callable[..., Path], name: str
) -> None:
    folder = checkpoint(name)
    observed = Observed(folder, CALIBRATION)
    ranges = measure(open_short(folder), CALIBRATION)
    assert ranges.checkpoint == DIGEST
    assert ranges.calibration == CALIBRATION
    assert ranges.inputs == pytest.approx(observed.without_modulation(), rel=1e-4)
    assert ranges.values == pytest.approx(observed.largest["values"], rel=1e-4)
    for kind in ("queries", "keys"):
        bounds: dict[str, float] = getattr(ranges, kind)
        seen = observed.largest[kind]
        assert bounds.keys() == seen.keys()
        for attention, bound in bounds.items():
            assert bound / 6 < seen[attention] < bound * (1 + 1e-6)


def test_bounds_of_queries_and_keys_are_attained(
    opened: Checkpoint, quick: ActivationRanges
) -> None:
    weights = opened.part("transformer").weights
    head_dim = opened.transformer.head_dim
    for attention in quick.keys:
        for bounds, scale, norms in (
            (quick.queries, head_dim**-0.5, ("norm_q", "norm_added_q")),
            (quick.keys, 1.0, ("norm_k", "norm_added_k")),
        ):
            names = [f"{attention}.{norm}.weight" for norm in norms]
            gammas = [torch.from_numpy(weights[n].read()) for n in names if n in weights]
            # All of a head's energy in one channel, whichever it is.
            heads = 100 * torch.eye(head_dim)
            largest = max(F.rms_norm(heads, (head_dim,), g, 1e-6).abs().max() for g in gammas)
            assert bounds[attention] == pytest.approx(scale * float(largest), rel=1e-5)


def test_linears_that_share_an_input_have_equal_ranges(quick: ActivationRanges) -> None:
    for block in ("transformer_blocks.1", "single_transformer_blocks.0"):
        shared = ["attn.to_q", "attn.to_k", "attn.to_v"]
        shared += ["proj_mlp"] if block.startswith("single") else []
        assert len({quick.inputs[f"{block}.{linear}"] for linear in shared}) == 1


def test_a_step_reads_each_weight_once_for_all_prompts_and_sizes(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    read = StoredTensor.read

    def counting(stored: StoredTensor, *arguments: Any) -> np.ndarray:
        reads[stored.name] += 1
        return read(stored, *arguments)

    monkeypatch.setattr(StoredTensor, "read", counting)
    measure(opened, dataclasses.replace(CALIBRATION, steps=2))
    assert reads["single_transformer_blocks.1.proj_out.weight"] == 2
    assert reads["transformer_blocks.0.norm1.linear.weight"] == 1
    assert reads["encoder.block.0.layer.0.SelfAttention.v.weight"] == 1


class Killed(Exception):
    """Takes the place of a signal."""


@pytest.fixture
def run_until(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run_until(stop, measurement)`: let it die after `stop` stages; returns how many it ran."""

    def run(stop: int, measurement: Callable[[], Any]) -> int:
        stages = 0
        advance = Task.advance

        def counting(task: Task, n: float = 1) -> None:
            nonlocal stages
            if task.description == "Measuring activations" and n == 1:
                stages += 1
                if stages > stop:
                    raise Killed
            advance(task, n)

        with monkeypatch.context() as patch:
            patch.setattr(Task, "advance", counting)
            measurement()
        return stages

    return run


STAGES = 1 + 2 + 1 + 2 + 1  # the chain of the small checkpoint: input, double, join, single, output


def test_a_killed_measurement_goes_on_and_gives_equal_ranges(
    opened: Checkpoint, quick: ActivationRanges, tmp_path: Path, run_until: Callable[..., int]
) -> None:
    state = tmp_path / "state"
    with pytest.raises(Killed):
        run_until(2 * STAGES + 3, lambda: measure(opened, QUICK, state))
    assert state.is_file()
    found = []
    assert run_until(10**6, lambda: found.append(measure(opened, QUICK, state))) == STAGES
    assert found == [quick]
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_measurement_or_a_broken_one_is_not_taken_over(
    opened: Checkpoint, quick: ActivationRanges, tmp_path: Path, run_until: Callable[..., int]
) -> None:
    state = tmp_path / "state"
    other = dataclasses.replace(QUICK, seed=QUICK.seed + 1)
    with pytest.raises(Killed):
        run_until(STAGES, lambda: measure(opened, other, state))
    assert state.is_file()
    found = []
    assert run_until(10**6, lambda: found.append(measure(opened, QUICK, state))) == 3 * STAGES
    state.write_bytes(b"no state at all")
    found.append(measure(opened, QUICK, state))
    assert found == [quick, quick]


def changed(source: Path, folder: Path, tensor: str, value: float) -> Checkpoint:
    """The checkpoint with one number of a transformer's tensor replaced."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / TRANSFORMER)
    tensors[tensor].view(-1)[0] = value
    (folder / TRANSFORMER).unlink()
    save_file(tensors, folder / TRANSFORMER)
    return open_short(folder)


def test_values_are_those_of_both_streams(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for number, linear in enumerate(("to_v", "add_v_proj")):
        bias = f"transformer_blocks.1.attn.{linear}.bias"
        large = changed(checkpoint("dev"), tmp_path / str(number), bias, 1000.0)
        ranges = measure(large, dataclasses.replace(QUICK, steps=1))
        assert ranges.values["transformer_blocks.1.attn"] == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("transformer_blocks.1.ff.net.0.proj.weight", "transformer_blocks.1.ff.net.2"),
        ("single_transformer_blocks.0.attn.to_v.weight", "single_transformer_blocks.0.attn.to_v"),
        ("proj_out.weight", "velocity"),
    ],
)
def test_what_is_not_finite_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, tensor: str, named: str
) -> None:
    """A weight that float32 holds, and a product that it does not."""
    damaged = changed(checkpoint("dev"), tmp_path / "checkpoint", tensor, 3e38)
    with pytest.raises(NumericError, match=named):
        measure(damaged)


def test_missing_tensors_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("dev"), tmp_path / "checkpoint"))
    tensors = load_file(folder / TRANSFORMER)
    del tensors["transformer_blocks.0.attn.norm_added_q.weight"]
    (folder / TRANSFORMER).unlink()
    save_file(tensors, folder / TRANSFORMER)
    with pytest.raises(CheckpointError, match="norm_added_q"):
        measure(open_short(folder))


@pytest.mark.parametrize(
    "change", [{"prompts": ()}, {"sizes": ()}, {"sizes": ((64, 40),)}, {"steps": 0}, {"seed": -1}]
)
def test_calibrations_that_make_no_picture_are_refused(
    opened: Checkpoint, change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        measure(opened, dataclasses.replace(QUICK, **change))


@pytest.mark.parametrize("size", [(1024, 1024), (1024, 768), (512, 512), (128, 128), (16, 48)])
def test_the_default_calibration_has_three_proportions_and_few_tokens(
    opened: Checkpoint, size: tuple[int, int]
) -> None:
    settings = {"height": size[0], "width": size[1]}
    calibration = default_calibration(dataclasses.replace(opened, settings=settings))
    tokens = [h * w // 256 for h, w in calibration.sizes]
    assert max(tokens) == tokens[0] <= min(1024, size[0] * size[1] // 256)
    assert all(h % 16 == w % 16 == 0 and h and w for h, w in calibration.sizes)
    if min(size) >= 64:
        assert len({h / w for h, w in calibration.sizes}) == 3
    assert "" in calibration.prompts
    assert (len(calibration.prompts) > 4) == (max(size) <= 512)


def test_the_default_calibration_follows_the_checkpoint() -> None:
    opened = open_checkpoint(DEMO_CHECKPOINTS["demo:dev"])
    index = json.loads((opened.root / "model_index.json").read_text())["_fluxdeploy"]
    calibration = default_calibration(opened)
    assert calibration.sizes[0] == (index["height"], index["width"])
    assert calibration.guidance == index["guidance_scale"]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"largest": "{", "steps": "1"},
        {"largest": "{}", "steps": "1"},
        {"largest": '{"inputs": 1, "values": {}}', "steps": "1"},
        {"largest": '{"inputs": {}, "values": {}}'},
        {"largest": '{"inputs": {}, "values": {}}', "steps": "one"},
    ],
)
def test_a_state_that_lacks_something_is_not_taken_over(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    path, recorder = tmp_path / "state", SimpleNamespace(inputs={}, values={}, groups=set())
    with TensorFileWriter(path, [], {"key": "k", **metadata}):
        pass
    assert _load_state(path, "k", [], recorder) == 0  # type: ignore[arg-type]
