"""Each linear's noise ratio, read back from exported files, and what it tells of broken ones."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from exporters.calibrate.ranges import ActivationRanges, linears
from exporters.calibrate.trajectory import start_samples, take_step
from exporters.check.fidelity import LIMIT, measure_fidelity
from exporters.check.readback import read_attentions, read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Stage
from exporters.components.registry import COMPONENTS
from exporters.components.run import ReplaceAttention, watch_linears
from fluxdeploy.bundle.recipe import Recipe
from fluxdeploy.errors import ExportError, NumericError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import (
    ATTENTIONS,
    LINEARS,
    SHORT,
    ExportInto,
    Quantized,
    open_short,
)
from tests.exporters.quantized.test_emulation import to_dynamic, to_fp8, to_int8
from tests.exporters.quantized.test_quantized_graphs import Graph

QUIET = Progress(quiet=True)
LAST = "single_transformer_blocks.1.proj_out"
PARTS = ("query", "key", "value", "output")
ATTENTION_LAYERS = {f"{attention}.{part}" for attention in ATTENTIONS for part in PARTS}
Change = Callable[[onnx.GraphProto], object]


def measure(checkpoint: Checkpoint, path: Path) -> dict[str, float]:
    return measure_fidelity(checkpoint, path, Recipe(), SHORT, QUIET)


@pytest.fixture(scope="module")
def inputs(opened: Checkpoint) -> dict[str, tuple[list[Tensor], Tensor]]:
    """What each linear is fed in the float32 network, and its weight."""
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    found: dict[str, tuple[list[Tensor], Tensor]] = {}

    def see(name: str, linear: nn.Linear, x: Tensor, output: Tensor) -> None:
        found.setdefault(name, ([], linear.weight.detach()))[0].append(x)

    samples = start_samples(opened, SHORT, QUIET)
    take_step(chain, weights, samples, 0, watch_linears(chain, see))
    return found


@pytest.mark.parametrize(
    ("precision", "compute"), [("fp8", "bf16"), ("int8", "fp32"), ("int8-dynamic", "fp32")]
)
def test_ratios_are_those_of_the_rounding(
    quantized: Quantized,
    opened: Checkpoint,
    ranges: ActivationRanges,
    inputs: dict[str, tuple[list[Tensor], Tensor]],
    precision: str,
    compute: str,
) -> None:
    found = measure(opened, quantized(precision, compute))
    how = PRECISIONS[precision].quantization
    assert how is not None
    assert found.keys() == LINEARS | (ATTENTION_LAYERS if how.attention else set())
    found = {name: ratio for name, ratio in found.items() if name in LINEARS}
    assert list(found) == list(linears(COMPONENTS["transformer"].source(opened, "fp32")[0]))
    narrow, end, headroom = {"fp8": (to_fp8, 448, 2.0), "int8": (to_int8, 127, 1.2)}[how.format]
    for name, ratio in found.items():
        samples, weight = inputs[name]
        scale = headroom * ranges.inputs[name] / end
        rounded = narrow(weight, weight.abs().amax(1, keepdim=True) / end)
        signal = noise = 0.0
        for x in samples:
            y = to_dynamic(x) if how.activations == "dynamic" else narrow(x, scale)
            signal += float((x @ weight.T).square().sum())
            noise += float((y @ rounded.T - x @ weight.T).square().sum())
        # bfloat16 scales are off by up to 1/512.
        assert ratio == pytest.approx(10 * math.log10(signal / noise), abs=0.5)
        assert ratio > 25, name


def test_ratios_of_attention_are_those_of_the_rounding(
    quantized: Quantized, opened: Checkpoint, ranges: ActivationRanges
) -> None:
    """Against the network's own linears and norms, and against attention written out in float64."""
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    scope = ""
    power: dict[str, list[float]] = {}
    merged: dict[str, list[Tensor]] = {}

    def enter(stage: Stage) -> None:
        nonlocal scope
        scope = stage.scope
        watch(stage)

    def see_linear(name: str, linear: nn.Linear, x: Tensor, output: Tensor) -> None:
        if name.endswith((".attn.to_v", ".attn.to_out.0", "transformer_blocks.1.proj_out")):
            merged.setdefault(name, []).append(output if name.endswith("to_v") else x)

    def see(query: Tensor, key: Tensor, value: Tensor, exact_shares: Tensor) -> Tensor:
        name, output = f"{scope}attn", exact_shares @ value
        merged.setdefault(f"{name}.value", []).append(value.transpose(1, 2).flatten(2))
        merged.setdefault(f"{name}.output", []).append(output.transpose(1, 2).flatten(2))
        exact = dict(zip(PARTS, (query, key, value, output), strict=True))
        rounded = {
            "query": to_fp8(query, ranges.queries[name] / 448),
            "key": to_fp8(key, ranges.keys[name] / 448),
            "value": to_fp8(value, 2 * ranges.values[name] / 448),
        }
        scores = rounded["query"].double() @ rounded["key"].double().transpose(2, 3)
        shares = to_fp8(torch.softmax(scores, -1).float(), 1 / 448)
        rounded["output"] = shares @ rounded["value"]
        for part, x in exact.items():
            sums = power.setdefault(f"{name}.{part}", [0.0, 0.0])
            sums[0] += float(x.square().sum())
            sums[1] += float((rounded[part] - x).square().sum())
        return output

    watch = watch_linears(chain, see_linear)
    samples = start_samples(opened, SHORT, QUIET)
    with ReplaceAttention(see):
        take_step(chain, weights, samples, 0, enter)
    # Nearly equal shares of a row round the same way, which a scale in bfloat16 would change.
    found = measure(opened, quantized("fp8", "fp32"))
    assert power.keys() == ATTENTION_LAYERS
    for name, (signal, noise) in power.items():
        assert found[name] == pytest.approx(10 * math.log10(signal / noise), abs=0.2), name
        assert found[name] > (20 if name.endswith("output") else 30), name
    for single in ("single_transformer_blocks.0", "single_transformer_blocks.1"):
        for linear, seen in zip(
            merged[f"{single}.attn.to_v"], merged[f"{single}.attn.value"], strict=True
        ):
            assert torch.equal(linear, seen)
    for x, seen in zip(
        merged[LAST], merged["single_transformer_blocks.1.attn.output"], strict=True
    ):
        assert torch.equal(x[..., : seen.shape[-1]], seen)
    double = "transformer_blocks.0.attn"
    for x, seen in zip(merged[f"{double}.to_out.0"], merged[f"{double}.output"], strict=True):
        assert torch.equal(x, seen[:, -x.shape[1] :])


def test_attention_comes_after_the_linears_that_feed_it(
    quantized: Quantized, opened: Checkpoint
) -> None:
    names = list(measure(opened, quantized("fp8", "bf16")))
    for block, before, after in (
        ("transformer_blocks.1.", "attn.add_v_proj", "attn.to_out.0"),
        ("single_transformer_blocks.0.", "attn.to_v", "proj_mlp"),
    ):
        place = names.index(f"{block}{before}") + 1
        between = [f"{block}attn.{part}" for part in PARTS]
        assert names[place : place + 5] == [*between, f"{block}{after}"]


def test_weights_alone_are_better_than_with_inputs(
    quantized: Quantized, opened: Checkpoint
) -> None:
    alone = measure(opened, quantized("fp8-weights"))
    both = measure(opened, quantized("fp8-linears"))
    assert all(both[name] < ratio < LIMIT for name, ratio in alone.items())


@pytest.fixture
def copy(quantized: Quantized, tmp_path: Path) -> Path:
    """An export to break."""
    folder = shutil.copytree(quantized("fp8", "bf16").parent, tmp_path / "copy")
    return Path(folder) / "transformer.onnx"


def edit(path: Path, change: Change) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def scale_input(graph: onnx.GraphProto, linear: str, factor: float) -> None:
    """Change the static scale of a linear's input, and of those that share it."""
    (reader,) = (node for node in graph.node if f"{linear}.weight" in node.input)
    (product,) = (node for node in graph.node if reader.output[0] in node.input)
    (wide,) = (node for node in graph.node if product.input[0] in node.output)
    (scale,) = (tensor for tensor in graph.initializer if tensor.name == wide.input[1])
    changed = onnx.numpy_helper.to_array(scale) * np.float32(factor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(scale.data_type)
    scale.CopyFrom(onnx.numpy_helper.from_array(changed.astype(dtype), scale.name))


def scale_attention(path: Path, factors: dict[tuple[str, str], float]) -> None:
    """Change static scales of attentions: of their "queries", "keys", "softmax" or "values"."""
    graph = Graph(path)
    for (attention, part), factor in factors.items():
        quantizer = graph.quantizer(graph.attention(graph.softmaxes[attention])[part])
        assert quantizer is not None
        scale = graph.initializers[quantizer.input[1]]
        changed = onnx.numpy_helper.to_array(scale) * np.float32(factor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(scale.data_type)
        scale.CopyFrom(onnx.numpy_helper.from_array(changed.astype(dtype), scale.name))
    path.write_bytes(graph.model.SerializeToString())


def scale_weight(path: Path, linear: str, factor: float) -> None:
    """Change the scales of a linear's weight in its file."""
    _, scales = read_linears(path)[linear].parts
    place = {entry.key: entry.value for entry in scales.external_data}
    file, offset = path.parent / place["location"], int(place["offset"])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(scales.data_type)
    values = np.fromfile(file, np.uint8, int(place["length"]), offset=offset).view(dtype)
    with file.open("r+b") as raw:
        raw.seek(offset)
        raw.write((values * np.asarray(factor, dtype)).astype(dtype).tobytes())


def test_wrong_scales_show_in_their_own_layers(
    quantized: Quantized, opened: Checkpoint, copy: Path
) -> None:
    before = measure(opened, quantized("fp8", "bf16"))
    double, single = "transformer_blocks.0.", "single_transformer_blocks.1."
    scale_weight(copy, f"{double}ff.net.2", 16)
    scale_weight(copy, f"{double}attn.to_out.0", 1 / 16)
    swapped = [f"{single}attn.to_q", f"{single}attn.to_v"]

    def change(graph: onnx.GraphProto) -> None:
        scale_input(graph, f"{single}proj_out", 1 / 16)
        scale_input(graph, f"{double}ff.net.0.proj", 0)
        scale_input(graph, f"{double}ff_context.net.2", math.nan)
        readers = [n for n in graph.node if n.input[0] in [f"{name}.weight" for name in swapped]]
        first, second = readers
        first.input[1], second.input[1] = second.input[1], first.input[1]

    edit(copy, change)
    found = measure(opened, copy)
    broken = {f"{double}{n}" for n in ("ff.net.2", "attn.to_out.0", "ff.net.0.proj")}
    broken |= {f"{double}ff_context.net.2", f"{single}proj_out", *swapped}
    assert {name for name, ratio in found.items() if ratio < 15} == broken
    assert {n: r for n, r in found.items() if n not in broken} == {
        n: r for n, r in before.items() if n not in broken
    }
    assert all(math.isfinite(ratio) for ratio in found.values())
    assert found[f"{double}ff_context.net.2"] == -LIMIT


def test_too_small_scales_of_attention_show_in_their_own_block(
    quantized: Quantized, opened: Checkpoint, copy: Path
) -> None:
    before = measure(opened, quantized("fp8", "bf16"))
    double, single = "transformer_blocks.1.attn", "single_transformer_blocks.0.attn"
    other, last = "transformer_blocks.0.attn", "single_transformer_blocks.1.attn"
    broken = {(double, "values"), (single, "queries"), (other, "keys"), (last, "softmax")}
    scale_attention(copy, dict.fromkeys(broken, 1 / 16))
    found = measure(opened, copy)
    gate = PRECISIONS["fp8"].min_sqnr
    assert gate is not None
    failed = {name for name, ratio in found.items() if ratio < gate - 5}
    assert failed == {
        *(f"{double}.value", f"{single}.query", f"{other}.key"),
        *(f"{attention}.output" for attention in (double, single, other, last)),
    }
    assert {n: r for n, r in found.items() if n not in failed} == {
        n: r for n, r in before.items() if n not in failed
    }


@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_too_large_scales_of_attention_are_refused(
    opened: Checkpoint, copy: Path, part: str
) -> None:
    attention = "single_transformer_blocks.1.attn"
    scale_attention(copy, {(attention, part): 16})
    named = {"queries": "query", "keys": "key", "values": "value"}[part]
    with pytest.raises(NumericError, match=rf"scale of {attention}\.{named} .* at most 16 times"):
        measure(opened, copy)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("queries", "Q of"),
        ("keys", "K of"),
        ("softmax", "the softmax output of"),
        ("values", "V of"),
    ],
)
def test_attention_that_is_quantized_in_part_is_refused(
    copy: Path, part: str, message: str
) -> None:
    graph = Graph(copy)
    attention = "transformer_blocks.0.attn"
    softmax = graph.softmaxes[attention]
    wide = graph.attention(softmax)[part]
    product = graph.through_casts(softmax, forwards=part in ("softmax", "values"))
    (place,) = (i for i, name in enumerate(product.input) if name == wide)
    product.input[place] = graph.unrounded(wide)
    quantizer = graph.quantizer(wide)
    assert quantizer is not None
    graph.nodes.remove(graph.producers[wide])
    graph.nodes.remove(quantizer)
    copy.write_bytes(graph.model.SerializeToString())
    with pytest.raises(ExportError, match=rf"{message} {attention} is not quantized"):
        read_attentions(copy)


def test_attention_with_two_scales_is_refused(copy: Path) -> None:
    graph = Graph(copy)
    attention = "single_transformer_blocks.0.attn"
    parts = graph.attention(graph.softmaxes[attention])
    wide = graph.producers[parts["values"]]
    wide.input[1] = graph.producers[parts["keys"]].input[1]
    copy.write_bytes(graph.model.SerializeToString())
    with pytest.raises(ExportError, match=f"{attention} is not as expected"):
        read_attentions(copy)


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("|proj_out)", "|proj_out)|proj_out", "proj_out is quantized, which must not be"),
        ("(0.proj|2)", "(2)", r"transformer_blocks\.0\.ff\.net\.0\.proj is not quantized"),
    ],
)
def test_other_linears_than_the_declared_ones_are_refused(
    export_into: ExportInto,
    opened: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaced: str,
    by: str,
    message: str,
) -> None:
    transformer = COMPONENTS["transformer"]
    pattern = str(transformer.quantized).replace("0\\.proj", "0.proj")
    changed = dataclasses.replace(transformer, quantized=pattern.replace(replaced, by))
    assert changed.quantized != pattern
    monkeypatch.setitem(COMPONENTS, "transformer", changed)  # type: ignore[arg-type]
    path = export_into(tmp_path, "fp8-weights")
    with pytest.raises(ExportError, match=message):
        measure(opened, path)


def test_graphs_of_another_checkpoint_are_refused(
    checkpoint: Callable[..., Path], quantized: Quantized
) -> None:
    graph = quantized("fp8-weights")
    schnell = checkpoint("schnell")
    with pytest.raises(ExportError, match="does not fit this checkpoint"):
        measure(open_short(schnell), graph)


@pytest.mark.parametrize(("part", "shape"), [("weight", [240, 192]), ("weight.scale", [48])])
def test_weights_of_another_shape_are_refused(
    copy: Path, opened: Checkpoint, part: str, shape: list[int]
) -> None:
    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (t for t in graph.initializer if t.name == f"{LAST}.{part}")
        assert list(tensor.dims) != shape
        tensor.dims[:] = shape

    edit(copy, change)
    with pytest.raises(ExportError, match=f"does not fit this checkpoint: {LAST} is not 96x480"):
        measure(opened, copy)


def rewire(graph: onnx.GraphProto) -> None:
    """Let nothing read the scales of a weight that is still there."""
    (reader,) = (n for n in graph.node if "transformer_blocks.0.ff.net.2.weight" in n.input)
    reader.input[1] = "hidden_states"


def duplicate(graph: onnx.GraphProto) -> None:
    (reader,) = (n for n in graph.node if "transformer_blocks.0.ff.net.2.weight" in n.input)
    graph.node.add().CopyFrom(reader)


@pytest.mark.parametrize("change", [rewire, duplicate])
def test_graphs_in_another_form_are_refused(copy: Path, change: Change) -> None:
    edit(copy, change)
    with pytest.raises(ExportError, match=r"transformer_blocks\.0\.ff\.net\.2\.weight is not as"):
        read_linears(copy)


def test_broken_files_are_refused(copy: Path, opened: Checkpoint) -> None:
    linear = read_linears(copy)[LAST]
    weight, _ = linear.parts
    (weights,) = (copy.parent / "weights").iterdir()
    whole = weights.read_bytes()
    place = {entry.key: entry.value for entry in weight.external_data}
    weights.write_bytes(whole[: int(place["offset"]) + 100])
    with pytest.raises(ExportError, match="was cut off"):
        linear.dequantized()
    weights.unlink()
    with pytest.raises(ExportError, match="No such file"):
        measure(opened, copy)
    copy.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read as an ONNX file"):
        measure(opened, copy)
    copy.unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        measure(opened, copy)


def test_unquantized_graphs_are_refused(
    opened: Checkpoint, traced: Callable[[str], Any], tmp_path: Path
) -> None:
    import onnx_ir as ir

    ir.save(traced("fp32"), tmp_path / "transformer.onnx")
    assert read_attentions(tmp_path / "transformer.onnx") == {}
    with pytest.raises(ExportError, match="is not quantized"):
        measure(opened, tmp_path / "transformer.onnx")


def test_the_middle_of_the_schedule_is_measured(
    opened: Checkpoint, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    watched: list[int] = []

    def step(*arguments: Any, **named: Any) -> None:
        steps.append(arguments[3])
        take_step(*arguments, **named)

    def watch(*arguments: Any) -> Any:
        watched.append(len(steps))
        return watch_linears(*arguments)

    monkeypatch.setattr("exporters.check.fidelity.take_step", step)
    monkeypatch.setattr("exporters.check.fidelity.watch_linears", watch)
    calibration = dataclasses.replace(SHORT, steps=3, prompts=("",), sizes=((16, 32),))
    measure_fidelity(opened, quantized("fp8-weights"), Recipe(), calibration, QUIET)
    assert steps == [0, 1]
    assert watched == [1]


def test_calibration_and_one_sample_are_independent(opened: Checkpoint) -> None:
    """A sample's way does not depend on the ones beside it."""
    chain, weights = COMPONENTS["transformer"].source(opened, "fp32")
    together = start_samples(opened, SHORT, QUIET)
    take_step(chain, weights, together, 0)
    alone = start_samples(opened, SHORT, QUIET)[:1]
    take_step(chain, weights, alone, 0)
    assert torch.equal(torch.from_numpy(alone[0].latents), torch.from_numpy(together[0].latents))
