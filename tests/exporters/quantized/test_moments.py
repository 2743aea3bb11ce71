"""INT4 numbers that make up for each other's rounding, against GPTQ as it is written down."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from exporters.calibrate.means import encode_bytes, encode_mean, spread_means, spread_moments
from exporters.calibrate.ranges import linears
from exporters.calibrate.trajectory import start_samples
from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from exporters.components.run import shared_inputs
from exporters.export import export_component, specify
from exporters.formats import FORMATS
from exporters.formats.moments import MomentsError, decode_moments, encode_moments, error_factors
from exporters.quality.emulate import Emulator
from exporters.quality.input_sums import InputSums
from exporters.quality.judge import OutputJudge
from exporters.quality.layers import Layers
from exporters.weights.bind import WeightFolder
from fluxdeploy.bundle.typed_json import FieldError
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.exporters.quantized.conftest import SHORT
from tests.exporters.quantized.test_emulation import distance

BLOCK = 32
INT4 = FORMATS["int4"]


def tokens(columns: int, count: int = 512) -> Tensor:
    """Channels that move together, of different sizes, far from 0."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, 8, generator=random) @ torch.randn(8, columns, generator=random)
    own = torch.randn(count, columns, generator=random)
    sizes = torch.rand(columns, generator=random) * 3
    return (mixed + own) * sizes + 5


def covariances(x: Tensor) -> np.ndarray:
    """[blocks, 32, 32], by numpy.cov."""
    columns = x.shape[1]
    blocks = math.ceil(columns / BLOCK)
    whole = np.zeros((blocks * BLOCK, blocks * BLOCK))
    whole[:columns, :columns] = np.cov(x.double().numpy().T, bias=True)
    starts = range(0, blocks * BLOCK, BLOCK)
    return np.stack([whole[i : i + BLOCK, i : i + BLOCK] for i in starts]).astype(np.float32)


def gptq(weight: Tensor, moments: np.ndarray, scales: Tensor) -> Tensor:
    """One number after the other in float64, with the inverse of what is left of each block.

    Where a number is rounded, those after it move by -e · H⁻¹[i, j] / H⁻¹[i, i], and its row and
    column leave H (B. Hassibi et al., "Optimal Brain Surgeon", 1993, equation 5). `scales` are
    [in / 32, out].
    """
    left, found = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for block, covariance in enumerate(moments):
        start = block * BLOCK
        width = min(BLOCK, weight.shape[1] - start)
        h = torch.from_numpy(covariance).double()
        h += 0.01 * h.diagonal().mean() * torch.eye(BLOCK)
        h = h[:width, :width]
        for i in range(width):
            column = start + i
            number = (left[:, column] / scales[block]).round().clamp(-8, 7)
            found[:, column] = number * scales[block]
            error = left[:, column] - found[:, column]
            inverse = torch.linalg.inv(h[i:, i:])
            left[:, column : start + width] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return found.float()


@pytest.mark.parametrize("columns", [64, 72])
def test_numbers_are_those_of_gptq(columns: int) -> None:
    x, weight = tokens(columns), torch.randn(48, columns)
    plain = INT4.emulate_weight(weight, ir.DataType.FLOAT)
    informed = INT4.informed(encode_moments(covariances(x)))
    found = informed.emulate_weight(weight, ir.DataType.FLOAT)
    codes, raw = informed.pack(
        [weight.numpy().copy()], (48, columns), ir.DataType.FLOAT, "", lambda: 1.0
    )
    scales = torch.from_numpy(raw.view(np.float32).reshape(-1, 48))
    assert codes.shape == (scales.shape[0] * BLOCK, 24)
    stored = decode_moments(encode_moments(covariances(x)), columns)
    same = gptq(weight, stored, scales.double())
    # Of sums in float32 a number in a thousand rounds the other way.
    assert (found - same).abs().gt(1e-3).float().mean() < 0.002
    expected = gptq(weight, covariances(x), scales.double())
    centred = x - x.mean(0)
    exact = centred @ weight.T
    losses = [distance(centred @ w.T, exact) for w in (plain, found, expected)]
    assert losses[1] < 0.8 * losses[0], losses
    assert losses[1] == pytest.approx(losses[2], rel=0.05)


def test_the_parts_that_a_weight_comes_in_do_not_matter() -> None:
    x, weight = tokens(64), torch.randn(38, 64).numpy()
    informed = INT4.informed(encode_moments(covariances(x)))
    packed = []
    for some in (38, 2, 12):
        parts = (weight[i : i + some].copy() for i in range(0, 38, some))
        packed.append([*informed.pack(parts, (38, 64), ir.DataType.BFLOAT16, "", lambda: 1.0)])
    for other in packed[1:]:
        assert all((a == b).all() for a, b in zip(packed[0], other, strict=True))


def test_channels_that_never_move_are_rounded_as_they_are() -> None:
    weight = torch.randn(6, 40)
    still = INT4.informed(encode_moments(np.zeros((2, BLOCK, BLOCK), np.float32)))
    plain = INT4.emulate_weight(weight, ir.DataType.FLOAT)
    assert torch.equal(still.emulate_weight(weight, ir.DataType.FLOAT), plain)


def test_sums_are_numpys_covariances() -> None:
    x = tokens(72)
    sums = InputSums(72, moments=True)
    for part in x.split(100):
        sums.add(part)
    assert np.allclose(sums.mean(), x.mean(0), rtol=1e-5)
    assert np.allclose(sums.covariances(), covariances(x), rtol=1e-3, atol=1e-3)


def test_moments_come_back() -> None:
    exact = covariances(tokens(72))
    raw = encode_moments(exact)
    assert raw.size == 3 * (2 * BLOCK + BLOCK * (BLOCK - 1) // 2)
    found = decode_moments(raw, 72)
    sizes = np.sqrt(np.einsum("bii->bi", exact))
    assert (np.abs(found - exact) <= 0.013 * sizes[:, :, None] * sizes[:, None]).all()
    assert torch.isfinite(error_factors(found)).all()
    with pytest.raises(MomentsError, match="1680 bytes, not 1120"):
        decode_moments(raw, 64)
    with pytest.raises(MomentsError, match="NaN or infinity"):
        decode_moments(np.full(560, 255, np.uint8), BLOCK)


@pytest.fixture(scope="module")
def known(opened: Checkpoint) -> dict[str, Any]:
    """`Layers.means` and `Layers.moments`, as a calibration has them."""
    samples = [sample.inputs(0) for sample in start_samples(opened, SHORT, Progress(quiet=True))]
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32", moments=True)
    OutputJudge(emulator, samples[:2])
    means = {name: encode_mean(mean) for name, mean in emulator.means.items()}
    texts = {name: encode_bytes(raw) for name, raw in emulator.moments.items()}
    assert texts.keys() == means.keys()
    return {
        "means": spread_means(emulator.chain, means),
        "moments": spread_moments(emulator.chain, texts),
    }


def test_a_graphs_numbers_are_those_that_were_judged(
    opened: Checkpoint, known: dict[str, Any], tmp_path: Any, remembered_traces: Any
) -> None:
    quantization = PRECISIONS["int4-weights"].quantization
    assert quantization is not None
    spec = specify(opened, COMPONENTS["transformer"], "int4-weights", "fp32")
    spec = spec.with_layers(Layers(quantization, **known))
    exported = export_component(spec, WeightFolder(tmp_path / "weights"))
    found = read_linears(tmp_path / exported.path)
    assert found.keys() == set(linears(spec.chain))
    for name, linear in found.items():
        stored = opened.part("transformer").weights[f"{name}.weight"]
        weight = torch.from_numpy(stored.read().reshape(stored.shape))
        plain = INT4.emulate_weight(weight, ir.DataType.FLOAT)
        judged = INT4.informed(known["moments"][name]).emulate_weight(weight, ir.DataType.FLOAT)
        assert torch.equal(linear.dequantized().T, judged), name
        assert not torch.equal(judged, plain), name


def test_velocities_come_nearer(opened: Checkpoint, known: dict[str, Any]) -> None:
    quantization = PRECISIONS["int4-weights"].quantization
    assert quantization is not None
    emulator = Emulator(COMPONENTS["transformer"], opened, "fp32")
    samples = [sample.inputs(0) for sample in start_samples(opened, SHORT, Progress(quiet=True))]
    exact = emulator.run(samples, None)
    errors = []
    for given in ({"means": known["means"]}, known):
        found = emulator.run(samples, Layers(quantization, **given))
        pairs = zip(found, exact, strict=True)
        errors.append(max(distance(a["velocity"], b["velocity"]) for a, b in pairs))
    assert errors[1] < 0.9 * errors[0]


def test_moments_of_other_networks_are_refused(opened: Checkpoint) -> None:
    chain, _ = COMPONENTS["transformer"].source(opened, "fp32")
    first = next(iter(shared_inputs(chain).values()))
    for name, text, problem in (
        ("of_another", "", "no input"),
        (first, "AAAA", "has 3 bytes, not"),
        (first, "A", "is not moments in base64"),
    ):
        with pytest.raises(FieldError, match=problem):
            spread_moments(chain, {name: text})


def test_formats_without_use_for_them_measure_none() -> None:
    assert [name for name, known in FORMATS.items() if known.takes_moments] == ["int4"]
    for known in FORMATS.values():
        assert known.informed(None) == known
