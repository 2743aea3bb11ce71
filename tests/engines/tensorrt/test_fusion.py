"""The fusion report: what the builder's messages mean, and what is wrong with an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines import BuildSettings
from engines.tensorrt.fusion import (
    Expectation,
    FusionReport,
    Products,
    check,
    expect,
    read_report,
    unfused,
)
from fluxdeploy.bundle.manifest import DimensionRange
from fluxdeploy.errors import EngineError
from fluxdeploy.progress import Progress
from tests.engines.conftest import source

PRODUCTS = Products(
    frozenset({"q", "k", "v", "out", "final"}), frozenset({"scores", "mixed"}), frozenset({"soft"})
)
WANTED = Expectation(1, "fp8", {"fp8": 4, "bf16": 1}, "bf16", 10_000)


def tensors(kinds: str) -> str:
    return ", ".join(
        f"{{ Name: t{i}, Dimensions: [1,-1,64], Strides: [-1,64,1], StrideOrder: [2,1,0], "
        f"Datatype: {kind}, Format: (Linear) Row major linear format }}"
        for i, kind in enumerate(kinds.split())
    )


def line(name: str, kind: str, inputs: str, constants: str, outputs: str, *nodes: str) -> str:
    """A kernel as TensorRT-RTX 1.7 prints it."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(inputs)}], "
        f"Constants: [ {tensors(constants)}], Outputs: [ {tensors(outputs)}], "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


def merged(dtype: str = "FP8", result: str = "BFloat16") -> str:
    constants = f"{dtype} Float Float"
    return line("v+k+q_myl0_2", "gemm", dtype, constants, result, "q", "q_t", "k", "v")


SCALING = line("__myl_MulAdd_myl0_3", "kgen", "BFloat16", "BFloat16", "FP8", "q", "add")
ATTENTION = line(
    "_gemm_mha_v2_myl0_4", "kgen", "FP8 FP8 FP8", "", "FP8", "scores", "soft", "cast", "mixed"
)
OUT = line("out_myl0_5", "gemm", "FP8", "FP8 Float Float", "BFloat16", "out")
FINAL = line(
    "__myl_FcAddCastMulAdd_myl0_6", "runtime_fusion", "Float BFloat16", "BFloat16", "Float", "final"
)
GOOD = (merged(), SCALING, ATTENTION, OUT, FINAL)


def read(*lines: str, engine_bytes: int = 100_000) -> FusionReport:
    return read_report(("Layers:", *lines, "", "I/O Tensors:"), PRODUCTS, engine_bytes)


def test_a_good_engine() -> None:
    report = read(*GOOD, "Total Weights Memory: 10020 bytes")
    assert report.gemms == {"bf16": 1, "fp8": 4}
    assert report.fused_attentions == {"fp8": 1}
    assert report.weight_bytes == 10020
    assert report.kernels[0].kind == "gemm"
    assert report.kernels[0].constants == ("fp8", "fp32", "fp32")
    assert check(report, WANTED) == []
    assert FusionReport.from_json(report.as_json()) == report


def test_the_widest_profile_counts() -> None:
    """A second profile has kernels of its own."""
    wide = line("out_myl1_5", "gemm", "BFloat16", "BFloat16 Float Float", "BFloat16", "out")
    report = read(*GOOD, wide)
    assert report.linears["out"] == "bf16"
    assert "3 linears run in fp8 where 4 were asked" in check(report, WANTED)[0]
    soft = line("__myl_MaxExp_myl1_4", "kgen", "BFloat16", "", "FP8", "soft", "scores")
    assert read(*GOOD, soft).materialized == ("soft",)


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "constants", "found"),
    [
        ("__myl_CastMulCastFc_myl0_1", "runtime_fusion", "BFloat16", "BFloat16 FP8", "fp8-weights"),
        ("__myl_CastMulCastFc_myl0_1", "runtime_fusion", "FP8", "BFloat16 FP8", "fp8-weights"),
        ("__myl_CastFc_myl0_1", "runtime_fusion", "FP8", "BFloat16", "bf16"),
        ("__myl_FcAddCast_myl0_1", "runtime_fusion", "Half", "Half Half", "fp16"),
        ("out_myl0_1", "gemm", "Half", "Int8 Float Float", "int8-weights"),
        ("out_myl0_1", "gemm", "Int8", "Int8 Float Float", "int8"),
        ("out_myl0_1", "gemm", "FP4E2M1 FP8", "FP4E2M1 Float Float FP8", "fp4"),
        ("out_myl0_1", "gemm", "BFloat16", "FP4E2M1 Float Float FP8", "fp4-weights"),
        (
            "__myl_ReplCastMulCastFc_myl0_1",
            "runtime_fusion",
            "BFloat16",
            "Int4 BFloat16",
            "int4-weights",
        ),
        ("out_myl0_1", "gemm", "Float", "Float Float Float", "fp32"),
        ("out_myl0_1", "correlation", "BFloat16 BFloat16", "BFloat16 Float Float", "bf16"),
        ("__myl_CorrCast_myl0_1", "runtime_fusion", "BFloat16", "BFloat16", "bf16"),
    ],
)
def test_types_of_products(name: str, kind: str, inputs: str, constants: str, found: str) -> None:
    products = Products(frozenset({"out"}), frozenset(), frozenset())
    made = line(name, kind, inputs, constants, "BFloat16", "out")
    assert read_report([made], products, 1).gemms == {found: 1}


def test_a_bias_does_not_make_an_attention_float32() -> None:
    inputs = "BFloat16 BFloat16 Float BFloat16"
    fused = line("_gemm_mha_v2_myl0_4", "kgen", inputs, "", "BFloat16", "scores", "soft", "mixed")
    assert read(merged(), fused, OUT, FINAL).fused_attentions == {"bf16": 1}


def test_products_that_no_kernel_tells_of() -> None:
    with pytest.raises(EngineError, match="does not tell which kernel computes out, so that"):
        read(merged(), ATTENTION, FINAL)


def test_what_is_too_many_or_missing() -> None:
    report = read(*GOOD)
    assert check(report, replace(WANTED, attentions=2)) == ["the engine has 1 attentions, not 2"]
    more = replace(WANTED, gemms={"bf16": 2})
    assert check(report, more)[0].startswith("4 linears run in fp8, more than the 0 that were")
    wide = read(merged(result="Float"), SCALING, ATTENTION, OUT, FINAL)
    assert check(wide, WANTED)[0].startswith("3 quantized linears give float32 instead of bf16")
    single = replace(WANTED, compute="fp32")
    assert check(wide, single) == [], "what is asked for in float32 may give it"


def test_sizes() -> None:
    report = read(*GOOD)
    assert check(replace(report, weight_bytes=10_000_000), WANTED)[0].startswith(
        "the engine holds 10000000 bytes of weights where 10000 were expected"
    )
    assert "more than" in check(replace(report, engine_bytes=100_000_000), WANTED)[0]


def test_float32_engines_have_no_fused_attention() -> None:
    report = replace(read(*GOOD), attentions={}, materialized=("soft",))
    for kind in ("fp32", None):  # and with None any form will do
        plain = Expectation(1, kind, {"fp8": 4}, "fp32", 10_000)
        assert check(report, plain) == []
        assert unfused(report, plain) is None
    assert check(report, WANTED) == []
    assert "1 attentions are not fused" in str(unfused(report, WANTED))
    assert unfused(read(*GOOD), WANTED) is None


def test_layers_that_a_recipe_spares() -> None:
    """Some linears have narrow weights alone, and some attentions are wide."""
    report = replace(
        read(*GOOD),
        linears={"a": "fp8", "b": "fp8-weights", "c": "bf16"},
        attentions={"x": "fp8", "y": "bf16"},
    )
    gemms = {"fp8": 1, "fp8-weights": 1}
    wanted = Expectation(2, "fp8", gemms, "bf16", 10_000, wide_attentions=1)
    assert check(report, wanted) == []
    assert "run in bf16 where fp8" in check(report, replace(wanted, wide_attentions=0))[0]
    assert "run in bf16 where fp8" in check(report, replace(wanted, wide_attentions=2))[0]
    fewer = replace(wanted, gemms={"fp8": 2})
    assert "1 linears run in fp8 where 2" in check(report, fewer)[0]


@pytest.mark.parametrize(
    ("precision", "attention", "gemms"),
    [
        ("bf16", "bf16", {}),
        ("fp8", "fp8", {"fp8": 4}),
        ("fp8-linears", "bf16", {"fp8": 4}),
        ("fp8-weights", "bf16", {"fp8-weights": 4}),
        ("int8", "bf16", {"int8": 4}),
        ("int8-weights", "bf16", {"int8-weights": 4}),
        ("fp4", "fp8", {"fp4": 4}),
    ],
)
def test_what_a_precision_asks_of_an_engine(
    precision: str, attention: str, gemms: dict[str, int]
) -> None:
    asked = source("x", precision, Path("x.onnx"), (), 4, 1, 10)
    assert expect(asked) == Expectation(1, attention, gemms, "bf16", 10)
    assert expect(replace(asked, one_head=True)).attention_type is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": 3}', '{"kernels": [{"name": 1}]}'])
def test_what_is_no_report(text: str) -> None:
    with pytest.raises(EngineError, match="not a fusion report"):
        FusionReport.from_json(text)


@pytest.fixture(scope="module")
def needs_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.mark.usefixtures("needs_rtx")
class TestRealEngines:
    """What TensorRT-RTX makes of a block, and what the report says of it. No GPU is needed."""

    def build(
        self, folder: Path, targets: tuple[str, ...] = ("sm89",), buckets: int = 1, **how: object
    ) -> FusionReport:
        import tensorrt_rtx

        from engines.tensorrt.build import build_engine
        from tests.engines.tensorrt.block import INPUTS, RANGES, Block, write_block

        path = write_block(folder, Block(**how))
        asked = source("block", "bf16", path, INPUTS)
        profiles = tuple(
            RANGES | {"L": DimensionRange(64, 256 * n, 1024 * n)} for n in range(1, buckets + 1)
        )
        settings = BuildSettings(profiles)
        destination = folder / "block.engine"
        progress = Progress(quiet=True)
        report = build_engine(tensorrt_rtx, asked, targets, settings, None, destination, progress)
        assert destination.stat().st_size == report.engine_bytes
        return report

    def expectation(self, narrow: int = 6) -> Expectation:
        from tests.engines.tensorrt.block import HIDDEN, LINEARS, OUT, WIDTH

        weights = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
        others = 2 * WIDTH * OUT + 2 * (6 * WIDTH + HIDDEN + OUT)
        assert narrow <= len(LINEARS)
        return Expectation(1, "fp8", {"fp8": narrow, "bf16": 1}, "bf16", weights + others)

    def test_fp8(self, tmp_path: Path) -> None:
        """Two targets in one file, two buckets; q, k and v are merged or not as they come."""
        report = self.build(tmp_path, ("sm89", "sm120"), buckets=2)
        assert report.gemms == {"bf16": 1, "fp8": 6}
        assert report.fused_attentions == {"fp8": 1}
        assert check(report, self.expectation()) == []

    def in_fp4(self, narrow: int = 6) -> Expectation:
        from tests.engines.tensorrt.block import HIDDEN, WIDTH

        eight_bits = self.expectation()
        weights = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
        fewer = weights // 2 - weights // 16
        gemms = {"fp4": narrow, "bf16": 1}
        return Expectation(1, "fp8", gemms, "bf16", eight_bits.weight_bytes - fewer)

    def test_fp4(self, tmp_path: Path) -> None:
        report = self.build(tmp_path, ("sm120", "sm121"), buckets=2, narrow="fp4")
        assert report.gemms == {"bf16": 1, "fp4": 6}
        assert report.fused_attentions == {"fp8": 1}
        assert check(report, self.in_fp4()) == []

    def test_fp8_is_not_fp4(self, tmp_path: Path) -> None:
        problems = " ".join(check(self.build(tmp_path, ("sm120",)), self.in_fp4()))
        assert "0 linears run in fp4 where 6 were asked; the others run in bf16, fp8" in problems
        assert "6 linears run in fp8, more than the 0 that were asked" in problems
        assert "stored in a wider type" in problems

    def test_inputs_that_are_not_in_fp4(self, tmp_path: Path) -> None:
        how = {"narrow": "fp4", "activations": False, "attention": ()}
        problems = " ".join(check(self.build(tmp_path, ("sm120",), **how), self.in_fp4()))
        assert "0 linears run in fp4 where 6 were asked" in problems

    def test_bf16_is_not_fp8(self, tmp_path: Path) -> None:
        report = self.build(tmp_path, ("sm80",), linears=(), attention=())
        assert report.gemms == {"bf16": 7}
        assert report.fused_attentions == {"bf16": 1}
        problems = " ".join(check(report, self.expectation()))
        assert "1 attentions run in bf16 where fp8 was asked" in problems
        assert "0 linears run in fp8 where 6 were asked" in problems
        assert "stored in a wider type" in problems

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({"linear_scales": "fp32"}, "6 quantized linears give float32 instead of bf16"),
            (
                {"linears": ("q", "k", "v", "out", "up", "down", "final")},
                "7 linears run in fp8, more than the 6 that were asked",
            ),
            (
                {"linears": ("q", "k", "v", "out", "up")},
                "5 linears run in fp8 where 6 were asked; the others run in bf16: down_product",
            ),
            ({"activations": False}, "6 linears run in fp8-weights, more than the 0"),
        ],
    )
    def test_broken_graphs_are_caught(
        self, tmp_path: Path, how: dict[str, object], words: str
    ) -> None:
        problems = check(self.build(tmp_path, **how), self.expectation())
        assert any(words in problem for problem in problems), problems

    @pytest.mark.parametrize(
        "how", [{"attention_scales": "fp32"}, {"attention": ("q", "k", "softmax")}]
    )
    def test_attentions_that_are_not_fused_are_told(
        self, tmp_path: Path, how: dict[str, object]
    ) -> None:
        told = unfused(self.build(tmp_path, **how), self.expectation())
        assert "not fused and write their scores to memory, which takes longer" in str(told)
