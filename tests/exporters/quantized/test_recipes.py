"""Recipes: what is spared, what is smoothed, and that graphs are what was judged."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.calibrate.means import encode_mean, spread_means
from exporters.calibrate.ranges import ActivationRanges, channel_maxima, linears
from exporters.calibrate.trajectory import start_samples
from exporters.check.fidelity import measure_fidelity
from exporters.check.readback import read_attentions, read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import run_samples, shared_inputs, watch_linears
from exporters.export import export_component, specify
from exporters.quality import noise as noise_module
from exporters.quality.emulate import Emulator
from exporters.quality.judge import OutputJudge
from exporters.quality.layers import Layers, Smoother
from exporters.quality.noise import Move, measure_noise
from exporters.quality.recipes import Asked, Found, find_recipes
from exporters.quality.search import find_recipe
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.recipe import (
    NOTHING,
    WEIGHTS,
    Promise,
    Quality,
    Recipe,
    RecipeRecord,
)
from fluxdeploy.errors import ExportError
from fluxdeploy.precision import PRECISIONS, Quantization
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import LINEARS, SHORT, open_short

QUIET = Progress(quiet=True)
SPARED = {
    "transformer_blocks.0.attn.to_q": NOTHING,
    "transformer_blocks.1.ff.net.2": WEIGHTS,
    "transformer_blocks.0.attn": NOTHING,
}
SMOOTHED = {"single_transformer_blocks.0.proj_mlp": 0.5, "transformer_blocks.0.ff.net.2": 0.75}


def quantization(precision: str) -> Quantization:
    found = PRECISIONS[precision].quantization
    assert found is not None
    return found


@pytest.fixture(scope="module")
def samples(opened: Checkpoint) -> list[Mapping[str, Any]]:
    return [sample.inputs(0) for sample in start_samples(opened, SHORT, QUIET)[:2]]


@pytest.fixture(scope="module")
def means(opened: Checkpoint, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Of what each linear reads, as a calibration has them."""
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    OutputJudge(emulator, samples)
    found = {first: encode_mean(mean) for first, mean in emulator.means.items()}
    return dict(spread_means(emulator.chain, found))


@pytest.fixture
def layers(opened: Checkpoint, ranges: ActivationRanges) -> Callable[..., Layers]:
    """`layers(precision, recipe)`, with the factors of what the recipe smooths."""
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    smoother = Smoother(chain, weights, ranges)

    def make(precision: str, recipe: Recipe) -> Layers:
        smoothing = smoother.smooth(recipe.smoothed)
        return Layers(quantization(precision), recipe, ranges, smoothing)

    return make


@pytest.mark.parametrize(
    "precision", ["fp8", "int8", "int8-dynamic", "fp8-weights", "int4-weights", "fp4"]
)
def test_a_graph_with_a_recipe_computes_what_was_judged(
    tmp_path: Path,
    opened: Checkpoint,
    layers: Callable[..., Layers],
    traced: Callable[[str], Any],
    samples: list[Mapping[str, Any]],
    means: dict[str, Any],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exported file, read back and run in PyTorch, against the emulation of its layers."""
    how = quantization(precision)
    spared = {
        name: NOTHING if left == WEIGHTS and how.format == "nvfp4" else left
        for name, left in SPARED.items()
        if how.attention or not name.endswith(".attn")
    }
    smoothed = SMOOTHED if how.activations is not None and how.format != "nvfp4" else {}
    chosen = dataclasses.replace(layers(precision, Recipe(spared, smoothed)), means=means)
    monkeypatch.setattr("exporters.export.trace_chain", lambda chain: traced("fp32"))
    spec = specify(opened, COMPONENTS["transformer"], precision, "fp32").with_layers(chosen)
    exported = export_component(spec, WeightFolder(tmp_path / "weights"))
    path = tmp_path / exported.path
    found = read_linears(path)
    wide = [name for name, left in spared.items() if left == NOTHING and name in LINEARS]
    assert found.keys() == set(LINEARS) - set(wide)
    assert exported.quantized + exported.weights_only == len(found)
    if how.attention:
        assert "transformer_blocks.0.attn" not in read_attentions(path)
        assert exported.wide_attentions == 1
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}

    def see(name: str, linear: torch.nn.Linear, x: Tensor, output: Tensor) -> None:
        if name in found:
            biases[name] = linear.bias.detach().clone()
            seen[name] = x, output - linear.bias

    enter = watch_linears(emulator.chain, see)

    def both(stage: Any) -> None:
        enter(stage)
        emulator.enter(stage)

    with emulator.running(chosen):
        run_samples(emulator.chain, emulator.weights, samples[:1], both)
    for name, (x, output) in seen.items():
        product = found[name].narrow(x) @ found[name].dequantized()
        expected = product + (found[name].added() - biases[name])
        scale = output.abs().max().item()
        # NVFP4's scales of a group are those of its largest weight, which a linear alone has not.
        close = 0.2 if precision == "fp4" else 1e-4
        assert (output - expected).abs().max().item() <= close * scale, name


def test_fidelity_knows_what_is_spared(
    tmp_path: Path,
    opened: Checkpoint,
    layers: Callable[..., Layers],
    traced: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(SPARED, SMOOTHED)
    monkeypatch.setattr("exporters.export.trace_chain", lambda chain: traced("fp32"))
    spec = specify(opened, COMPONENTS["transformer"], "fp8", "fp32")
    spec = spec.with_layers(layers("fp8", recipe))
    path = tmp_path / export_component(spec, WeightFolder(tmp_path / "weights")).path
    ratios = measure_fidelity(opened, path, recipe, SHORT, QUIET)
    assert "transformer_blocks.0.attn.to_q" not in ratios
    assert "transformer_blocks.1.ff.net.2" in ratios
    assert "transformer_blocks.0.attn.query" not in ratios
    assert "transformer_blocks.1.attn.query" in ratios
    assert min(ratios.values()) > 15
    with pytest.raises(ExportError, match="to_q is not quantized"):
        measure_fidelity(opened, path, Recipe(), SHORT, QUIET)


def test_inputs_are_shared_where_one_tensor_is_read(opened: Checkpoint) -> None:
    chain, _ = COMPONENTS["transformer"].source(opened, "fp32")
    first = shared_inputs(chain)
    block, single = "transformer_blocks.1.attn.", "single_transformer_blocks.0."
    for name in ("to_q", "to_k", "to_v"):
        assert first[block + name] == block + "to_q"
        assert first[f"{single}attn.{name}"] == f"{single}proj_mlp"
    assert first[f"{single}proj_out"] == f"{single}proj_out"
    assert first[block + "add_v_proj"] == block + "add_q_proj"


def test_channels_are_the_largest_seen(
    opened: Checkpoint, ranges: ActivationRanges, samples: list[Mapping[str, Any]]
) -> None:
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    first = shared_inputs(chain)
    for name in linears(chain):
        if first[name] == name:
            maxima = channel_maxima(ranges, name)
            largest = ranges.inputs[name]
            assert largest <= maxima.max() <= 1.2 * largest
    seen: dict[str, Tensor] = {}
    enter = watch_linears(chain, lambda name, linear, x, output: seen.update({name: x}))
    run_samples(chain, weights, samples[:1], enter)
    x = seen["transformer_blocks.0.ff.net.2"].abs().flatten(0, -2).amax(0).numpy()
    assert (x <= channel_maxima(ranges, "transformer_blocks.0.ff.net.2") * 1.0001).all()


def test_smoothing_moves_outliers_and_changes_no_product(
    opened: Checkpoint, ranges: ActivationRanges
) -> None:
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    first = "transformer_blocks.0.ff.net.0.proj"
    maxima = channel_maxima(ranges, first)
    codes = np.full(len(maxima), 128, np.uint8)  # 1 everywhere, and 256 in one channel
    codes[3] += 32
    outlying = {**ranges.channels, first: base64.b64encode(codes.tobytes()).decode()}
    broken = dataclasses.replace(ranges, channels=outlying)
    smoother = Smoother(chain, weights, broken)
    smoothing = smoother.smooth({first: 0.5})[first]
    factor = smoothing.factors
    assert smoothing.largest == pytest.approx(float((channel_maxima(broken, first) * factor).max()))
    assert (np.log2(factor) % 1 == 0).all()
    assert factor[3] <= np.median(factor) / 8
    assert factor.max() <= 4
    x = torch.randn(5, len(factor))
    weight = torch.randn(7, len(factor))
    scales = torch.from_numpy(factor)
    assert torch.allclose((x * scales) @ (weight / scales).T, x @ weight.T, atol=1e-4)


def test_biases_make_up_for_what_is_rounded_in_the_mean(
    opened: Checkpoint, samples: list[Mapping[str, Any]], means: dict[str, Any]
) -> None:
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    plain = Layers(quantization("int4-weights"))
    corrected = dataclasses.replace(plain, means=means)
    before, after = (emulator.worst_layer(samples[:1], how) for how in (plain, corrected))
    assert after > before + 2, "dB"


def test_noise_names_the_layer_that_makes_it(
    opened: Checkpoint, ranges: ActivationRanges, samples: list[Mapping[str, Any]]
) -> None:
    """A linear whose range is far too large for INT8 has nearly all of the noise."""
    bad = "transformer_blocks.1.ff.net.0.proj"
    broken = dataclasses.replace(ranges, inputs={**ranges.inputs, bad: 60 * ranges.inputs[bad]})
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    layers = Layers(quantization("int8"), ranges=broken)
    noise = measure_noise(emulator, samples, layers, None)
    best = max(noise.moves, key=lambda move: move.saved)
    assert (best.layer, best.left) == (bad, WEIGHTS)
    assert best.saved > sum(m.saved for m in noise.moves) / 2


def test_what_is_spared_already_is_not_looked_at(
    opened: Checkpoint, samples: list[Mapping[str, Any]]
) -> None:
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    spared = dict.fromkeys(emulator.large[2:], NOTHING)
    layers = Layers(quantization("fp8-weights")).sparing(spared)
    noise = measure_noise(emulator, samples[:1], layers, None)
    assert {move.layer for move in noise.moves} == set(emulator.large[:2])
    assert all(move.saved > 0 for move in noise.moves)


def test_noise_is_the_same_however_many_blocks_are_held(
    opened: Checkpoint, samples: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Layers(quantization("int4-weights"))
    chain, _ = COMPONENTS["transformer"].source(opened, "fp32")
    found = []
    for held in (noise_module._HELD, 0):
        monkeypatch.setattr(noise_module, "_HELD", held)
        emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
        heard, entered = Mock(), Mock()
        emulator.put_beside(entered)
        found.append(measure_noise(emulator, samples, layers, None, heard))
        assert heard.call_count == len(chain.stages)
        # Each of the four blocks is followed to the end by itself where nothing more is held.
        assert (entered.call_count > len(chain.stages)) == (held == 0)
    assert found[0] == found[1]
    assert len(found[0].moves) == len(LINEARS)


class _Judge:
    """Of noises that add up: the quality is what the moves say it is."""

    def __init__(self, moves: list[Move], samples: list[Mapping[str, Any]]) -> None:
        self.samples = samples
        self.seen: list[Layers] = []
        self._moves = moves

    def judge(self, layers: Layers) -> Quality:
        self.seen.append(layers)
        left = sum(
            move.saved
            for move in self._moves
            if layers.recipe.spared.get(move.layer) not in (move.left, NOTHING)
        )
        return Quality(1 - left / 2, -10 * math.log10(left + 1e-15), 1.0)


def test_the_fewest_layers_are_spared(
    opened: Checkpoint,
    ranges: ActivationRanges,
    samples: list[Mapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    powers = [1e-3, 5e-4, 1e-4, *([1e-7] * (len(emulator.large) - 3))]
    moves = [
        Move(name, NOTHING, power, 1.0) for name, power in zip(emulator.large, powers, strict=True)
    ]
    monkeypatch.setattr(
        "exporters.quality.search.measure_noise",
        lambda *_: SimpleNamespace(smoothed={}, moves=moves),
    )
    layers = Layers(quantization("fp8-weights"), ranges=ranges)

    def search(psnr: float) -> Any:
        judge = _Judge(moves, samples)
        return find_recipe(
            emulator, "fp8-weights", layers, judge, Promise(psnr=psnr), lambda: None, QUIET
        )

    kept = search(25.0)
    assert kept.recipe == Recipe()
    assert kept.before == kept.after
    assert kept.share == 0
    some = search(30.5)
    assert list(some.recipe.spared) == [emulator.large[0]]
    assert some.after.psnr >= 30.5 > some.before.psnr
    more = search(36.5)
    assert set(more.recipe.spared) == set(emulator.large[:2])
    assert 0 < some.share < more.share < 1
    rows, columns = emulator.weights[f"{emulator.large[0]}.weight"].shape
    assert some.extra_bytes == 3 * rows * columns - 4 * rows  # FP8 and a scale a row to float32
    every = search(99.0)
    assert set(every.recipe.spared) == set(emulator.large)
    assert every.share == 1


def test_a_text_encoder_is_judged_by_its_output(opened: Checkpoint) -> None:
    emulator = Emulator(COMPONENTS["t5"], opened, "bf16")
    ids = [{"input_ids": np.arange(16, dtype=np.int32)[None] + 5}]
    judge = OutputJudge(emulator, ids)
    layers = Layers(quantization("int8-weights"))
    promise = Promise(cosine=0.9999995)
    found = find_recipe(emulator, "int8-weights", layers, judge, promise, lambda: None, QUIET)
    assert found.before is not None
    assert found.after is not None
    assert found.before.cosine < 0.9999995 <= found.after.cosine
    assert found.recipe.spared
    assert found.share > 0


def known_record(precision: str, promise: Promise) -> RecipeRecord:
    recipe = Recipe({"transformer_blocks.0.attn.to_q": NOTHING}, {})
    return RecipeRecord(precision, promise, recipe, Quality(0.9), Quality(0.99), 0.1, 5)


def test_a_recipe_of_an_earlier_build_is_taken_over(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("exporters.quality.recipes.PictureJudge")  # nothing is drawn
    asked = Asked(COMPONENTS["transformer"], "fp8-weights", "bf16")
    promise = Promise(psnr=31.0)
    known = {"transformer": known_record("fp8-weights", promise)}

    def found(promise: Promise, known: Mapping[str, RecipeRecord]) -> Found:
        means = {"transformer": {"transformer_blocks.0.attn.to_q": "AAAA"}}
        return find_recipes(opened, [asked], unmeasured, promise, Found(known, means), QUIET)

    for asks in (promise, Promise()):
        taken = found(asks, known)
        assert taken.recipes == known
        assert taken.means, "what a recipe was judged with is taken with it"
    for other in (known_record("fp8", promise), known_record("fp8-weights", Promise(psnr=30.0))):
        with pytest.raises(NameError, match="PictureJudge"):
            found(promise, {"transformer": other})


def unmeasured() -> ActivationRanges:
    raise AssertionError("activations are measured without need")


def test_shapes_that_a_format_cannot_have_are_spared(checkpoint: Callable[..., Path]) -> None:
    """The widths of `schnell` are no multiples of 16, but for its MLPs'."""
    source = open_short(checkpoint("schnell"))
    asked = Asked(COMPONENTS["transformer"], "fp4", "bf16")
    judged = find_recipes(source, [asked], unmeasured, Promise(), Found(), QUIET)
    found = judged.recipes["transformer"]
    assert not judged.means
    weights = source.part("transformer").weights
    for linear, left in found.recipe.spared.items():
        assert left == NOTHING
        assert weights[f"{linear}.weight"].shape[1] % 16, linear
    assert 0 < found.share <= 1
    assert found.extra_bytes > 0
    assert (found.before, found.after) == (None, None)
