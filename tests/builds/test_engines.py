"""Bundles with TensorRT-RTX engines, really built, for GPUs that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from engines import open_engine
from engines.golden import measure_component, require
from engines.tensorrt.fusion import FusionReport
from engines.tensors import check_inputs
from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_random_checkpoint
from fluxdeploy.build.build import build
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.build.sizes import SizeRange
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.bundle.tensorfile import read_header, read_tensor
from fluxdeploy.errors import EngineError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from tests.support.shared_folder import SharedFolder

pytestmark = pytest.mark.usefixtures("remembered_traces")

QUIET = Progress(quiet=True)
# Above 512 pixels an engine has more profiles, and each takes as long as all of these.
SMALL = SizeRange((256, 256), (512, 512), (512, 512))
BLOCKS, DOUBLE = 7, 2
LINEARS = 12 * DOUBLE + 5 * (BLOCKS - DOUBLE)


def report(bundle: Path, target: str, component: str) -> FusionReport:
    path = bundle / "engines" / "tensorrt-rtx" / target / f"{component}.kernels.json"
    return FusionReport.from_json(path.read_text())


@pytest.fixture(scope="session")
def built(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """`built(precision)`: the default model with engines for an Ada and a Blackwell GPU.

    Those in FP8 have a profile for each of two ranges of sizes, the others one.
    """

    def make(precision: str) -> Path:
        request = BuildRequest(
            precision=precision,
            runtimes=("tensorrt-rtx",),
            targets=("sm89", "sm120"),
            sizes=replace(SMALL, max=(1024, 1024)) if precision == "fp8" else SMALL,
        )
        return shared_folder.entry(f"rtx-{precision}", lambda folder: build(request, folder, QUIET))

    return make


@pytest.mark.parametrize("precision", ["fp8", "fp16", "bf16"])
def test_every_component_has_engines_of_the_precision_asked_for(
    built: Callable[[str], Path], precision: str
) -> None:
    root = built(precision)
    bundle = open_bundle(root, check="all")
    for name, record in bundle.manifest.components.items():
        assert [engine.target for engine in record.engines] == ["sm89", "sm120"], name
        assert len({engine.path for engine in record.engines}) == 2
    assert bundle.manifest.components["transformer"].precision == precision
    sizes = bundle.manifest.components["transformer"].engines[0].dimensions
    assert (sizes["L"].min, sizes["L"].max) == (256, 4096 if precision == "fp8" else 1024)
    for target in ("sm89", "sm120"):
        found = report(root, target, "transformer")
        assert found.fused_attentions == {precision: BLOCKS}
        assert found.materialized == ()
        others = {"fp8": LINEARS, "bf16": 2} if precision == "fp8" else {precision: LINEARS + 2}
        assert found.gemms == others


def test_fp8_weights_of_the_conditioner_stay_in_8_bits(built: Callable[[str], Path]) -> None:
    found = report(built("fp8"), "sm89", "conditioner")
    assert found.gemms["fp8-weights"] == 2 * DOUBLE + (BLOCKS - DOUBLE)


def test_engines_are_refused_in_words_where_there_is_no_gpu(built: Callable[[str], Path]) -> None:
    words = r"tensorrt-rtx on sm120, sm89: .*no NVIDIA driver.* all the same: --runtime emulate"
    with (
        FluxPipeline.from_bundle(built("fp8")) as pipe,
        pytest.raises(EngineError, match=words),
    ):
        pipe("a red circle", num_inference_steps=1)


def test_the_numbers_of_engines_for_a_gpu_are_within_their_gates_on_a_cpu(
    built: Callable[[str], Path],
) -> None:
    bundle = open_bundle(built("fp8"))
    for name, record in bundle.manifest.components.items():
        assert record.golden is not None
        golden = bundle.path(record.golden.path)
        with open_engine(bundle, name, "emulate") as engine:
            require(name, measure_component(engine, golden), record.golden)
            assert engine.emulated


def test_golden_tensors_have_sizes_that_the_engines_take(built: Callable[[str], Path]) -> None:
    bundle = open_bundle(built("fp8"))
    for name, record in bundle.manifest.components.items():
        assert record.golden is not None
        file = read_header(bundle.path(record.golden.path))
        inputs = {spec.name: read_tensor(file, f"input.{spec.name}") for spec in record.inputs}
        for engine in record.engines:
            check_inputs(name, record.inputs, engine.dimensions, inputs)


@pytest.mark.parametrize(
    ("precision", "targets", "words"),
    [
        ("fp8", ("sm86",), "FP8"),
        ("fp8", ("sm89", "sm80"), "FP8"),
        ("bf16", ("sm75",), "bfloat16"),
        ("bf16", ("sm42",), "sm42"),
    ],
)
def test_impossible_pairs_are_refused_before_any_work(
    tmp_path: Path, precision: str, targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build(BuildRequest(precision=precision, targets=targets), tmp_path / "bundle", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_target_has_to_be_named_where_there_is_no_gpu(tmp_path: Path) -> None:
    request = BuildRequest(precision="fp8", runtimes=("tensorrt-rtx",))
    with pytest.raises(EngineError, match="--target: tensorrt-rtx builds in fp8 for sm121, sm120,"):
        build(request, tmp_path / "bundle", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_another_kind_fails_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q, K and V without the softmax in 8 bits leave attention in pieces: strict takes none."""
    from exporters.formats import EightBits

    whole = EightBits.narrow

    def forgetful(self: Any, edit: Any, value: Any, largest: float) -> Any:
        return value if largest == 1.0 else whole(self, edit, value, largest)

    monkeypatch.setattr(EightBits, "narrow", forgetful)
    request = BuildRequest(
        precision="fp8",
        runtimes=("tensorrt-rtx",),
        targets=("sm89",),
        sizes=SMALL,
        promise=Promise(),
        strict=True,
    )
    with pytest.raises(EngineError, match=r"transformer engine for sm89 is not the fp8 engine"):
        build(request, tmp_path / "bundle", QUIET)
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="session")
def full_width(shared_folder: SharedFolder) -> Path:
    """FLUX.1's width and heads, one block of each kind, and the smallest of all else."""

    return shared_folder.entry(
        "full-width", lambda folder: write_random_checkpoint(folder, flux_of_depth(1, 1))
    )


def test_full_width_in_fp8_is_about_half_of_bf16(full_width: Path, tmp_path: Path) -> None:
    """One fused FP8 attention a block, FP8 products, and an engine of 0.55 of bf16's at most."""
    from engines import BuildSettings, EngineSource, runtimes
    from exporters.calibrate.ranges import ActivationRanges, attentions, linears
    from exporters.calibrate.trajectory import default_calibration
    from exporters.checkpoint import open_checkpoint
    from exporters.components.registry import COMPONENTS
    from exporters.export import export_component, specify
    from exporters.weights.bind import WeightFolder
    from fluxdeploy.build.sizes import resolution_buckets
    from fluxdeploy.bundle.manifest import Defaults, LatentSpec

    checkpoint = open_checkpoint(str(full_width))
    profiles = resolution_buckets(
        {"B", "L", "S", "T"},
        SizeRange(),
        Defaults(1024, 1024, 28, 3.5, 512, 0.6),
        LatentSpec(16, 2, 8, 0.3611, 0.1159),
    )
    assert [profile["L"].max for profile in profiles] == [1024, 4096, 16384]
    (runtime,) = runtimes("tensorrt-rtx")
    sizes = {}
    for precision in ("bf16", "fp8"):
        folder = tmp_path / precision
        spec = specify(checkpoint, COMPONENTS["transformer"], precision)
        chain = spec.chain
        ranges = ActivationRanges(
            "",
            default_calibration(checkpoint),
            dict.fromkeys(linears(chain), 8.0),
            *(dict.fromkeys(attentions(chain), 8.0) for _ in range(3)),
        )
        if spec.layers is not None:
            spec = spec.with_layers(replace(spec.layers, ranges=ranges))
        exported = export_component(spec, WeightFolder(folder / "weights"))
        source = EngineSource(
            "transformer",
            PRECISIONS[precision],
            "bf16",
            folder / exported.path,
            chain.inputs,
            exported.quantized,
            exported.attentions,
            one_head=False,
            weight_bytes=exported.weight_bytes,
        )
        # A profile more hardly makes an engine larger, and each takes as long as the first.
        settings = BuildSettings(profiles if precision == "fp8" else profiles[:1])
        engine, kernels = runtime.build(
            source, ("sm89",), settings, folder / "transformer.engine", QUIET
        )
        found = FusionReport.from_json(kernels.read_text())
        assert found.fused_attentions == {precision: 2}
        assert found.gemms == ({"fp8": 17, "bf16": 2} if precision == "fp8" else {"bf16": 19})
        sizes[precision] = engine.stat().st_size
    assert sizes["fp8"] <= 0.55 * sizes["bf16"], json.dumps(sizes)
