"""The engines for CPUs: bindings, resident inputs, closing, options and broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines import Engine, EngineOptions, open_engine, runtimes
from engines import onnxruntime as module
from engines import openvino as openvino_module
from engines.onnxruntime import OnnxRuntime
from engines.openvino import OpenVino
from engines.tensorrt.runtime import TensorRt
from fluxdeploy.bundle.manifest import TensorSpec
from fluxdeploy.errors import EngineError
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.precision import PRECISIONS
from tests.engines.conftest import INPUTS, Make, arrays, engine_record, expected, record

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(name)
    return name


@pytest.fixture
def engine(bundle: Make, runtime: str) -> Engine:
    return open_engine(bundle(engine_record(runtime)), "tiny", runtime)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": INPUTS[:2]}, "has the inputs x, scale, and its graph has x, scale, ids"),
        ({"inputs": (*INPUTS, TensorSpec("more", "float32", ("B",)))}, "x, scale, ids, more, and"),
        ({"inputs": (TensorSpec("X", "float32", ("B", "T", 4)), *INPUTS[1:])}, "the inputs X, sc"),
        ({"outputs": (TensorSpec("z", "float32", ("B", "T", 4)),)}, "has the outputs z, and its"),
        ({"outputs": (TensorSpec("y", "float32", ("B", "T", 2**20)),)}, "that y of tiny is float"),
        ({"outputs": (TensorSpec("y", "int32", ("B", "T", 4)),)}, "its graph has float32"),
        ({"inputs": (*INPUTS[:2], TensorSpec("ids", "float32", ("B",)))}, "its graph has int32"),
        ({"inputs": (INPUTS[0], TensorSpec("scale", "float32", ("B", "T", 4)), INPUTS[2])}, "scal"),
        ({"inputs": (INPUTS[0], TensorSpec("scale", "float32", ("B", "T")), INPUTS[2])}, "'T'], a"),
    ],
)
def test_a_manifest_that_the_graph_contradicts_is_refused_on_opening(
    bundle: Make, runtime: str, change: dict[str, Any], words: str
) -> None:
    made = bundle(engine_record(runtime))
    made.manifest.components["tiny"] = replace(made.manifest.components["tiny"], **change)
    with pytest.raises(EngineError, match="The manifest says") as caught:
        open_engine(made, "tiny", runtime)
    assert words in str(caught.value)


def split(inputs: dict[str, Any], *resident: str) -> tuple[dict[str, Any], dict[str, Any]]:
    placed = {name: array for name, array in inputs.items() if name in resident}
    return placed, {name: array for name, array in inputs.items() if name not in resident}


@pytest.mark.parametrize("resident", [(), ("scale",), ("scale", "ids"), ("x", "scale", "ids")])
def test_a_binding_gives_what_a_run_gives(engine: Engine, resident: tuple[str, ...]) -> None:
    inputs = arrays()
    placed, changing = split(inputs, *resident)
    binding = engine.bind(placed)
    assert (binding.run(changing)["y"] == engine.run(inputs)["y"]).all()
    assert (binding.run(changing)["y"] == expected(**inputs)).all()


def test_outputs_of_a_binding_are_reused_and_those_of_a_run_are_not(engine: Engine) -> None:
    placed, changing = split(arrays(), "scale", "ids")
    binding = engine.bind(placed)
    first = binding.run(changing)["y"]
    before = first.copy()
    second = binding.run({"x": changing["x"] + 1})["y"]
    assert np.shares_memory(second, first)
    assert (second != before).any()
    one, other = (engine.run(arrays())["y"] for _ in range(2))
    assert not np.shares_memory(one, other)


def test_resident_inputs_are_the_bindings_own(engine: Engine) -> None:
    """What the caller does with its array afterwards changes nothing, as on a GPU."""
    inputs = arrays()
    right = expected(**inputs)
    placed, changing = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    placed["scale"][:] = np.nan
    del placed
    assert (binding.run(changing)["y"] == right).all()


def test_shapes_may_change_between_calls(engine: Engine) -> None:
    inputs = arrays(2, 3)
    placed, _ = split(inputs, "scale", "ids")
    binding = engine.bind(placed)
    for tokens in (3, 7, 1, 7):
        x = arrays(2, tokens, seed=tokens)["x"]
        result = binding.run({"x": x})["y"]
        assert result.shape == (2, tokens, 4)
        assert (result == expected(x, inputs["scale"], inputs["ids"])).all()


def test_arrays_need_not_be_contiguous(engine: Engine) -> None:
    inputs = arrays(2, 4)
    right = expected(**inputs)
    strided = {name: np.asfortranarray(array) for name, array in inputs.items()}
    strided["x"] = np.repeat(inputs["x"], 2, axis=1)[:, ::2]
    assert not strided["x"].flags.c_contiguous
    assert (engine.run(strided)["y"] == right).all()
    placed, changing = split(strided, "scale")
    assert (engine.bind(placed).run(changing)["y"] == right).all()


def test_bad_tensors_of_a_binding(engine: Engine) -> None:
    placed, changing = split(arrays(), "scale", "ids")
    with pytest.raises(EngineError, match="tensor z is not one of its inputs"):
        engine.bind(placed | {"z": np.zeros(1, np.float32)})
    with pytest.raises(EngineError, match=r"ids has shape \[3\]; \[2\] is needed"):
        engine.bind(placed | {"ids": np.zeros(3, np.int32)})
    binding = engine.bind(placed)
    with pytest.raises(EngineError, match="scale is not one of its inputs; the inputs here are x"):
        binding.run(changing | {"scale": placed["scale"]})
    with pytest.raises(EngineError, match=r"x has shape \[3, 3, 4\]; \[2, 'T', 4\] is"):
        binding.run({"x": np.zeros((3, 3, 4), np.float32)})
    assert (binding.run(changing)["y"] == expected(**arrays())).all(), "still usable"


def test_closed_engine(engine: Engine) -> None:
    placed, changing = split(arrays(), "scale", "ids")
    binding = engine.bind(placed)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.run(arrays()),
        lambda: engine.bind(placed),
        lambda: binding.run(changing),
    ):
        with pytest.raises(EngineError, match="tiny: the engine was closed"):
            call()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(bundle: Make, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.base.usable_cpus", lambda: 2)
    options = EngineOptions(threads=threads)
    engine: Any = open_engine(bundle(), "tiny", options=options)
    assert engine.session.get_session_options().intra_op_num_threads == threads
    pytest.importorskip("openvino")
    engine = open_engine(bundle(engine_record("openvino")), "tiny", options=options)
    assert engine.model().get_property("INFERENCE_NUM_THREADS") == threads


def test_the_gpu_that_is_asked_for(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def session(path: str, settings: Any, providers: list[Any]) -> None:
        asked.extend(providers)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    cuda = engine_record(target="cuda")
    with pytest.raises(EngineError, match=r"cannot open tiny .*no GPU"):
        OnnxRuntime().open("tiny", record(cuda), cuda, bundle().root, EngineOptions(device=3))
    (provider, choices), fallback = asked
    assert (provider, choices["device_id"]) == ("CUDAExecutionProvider", 3)
    assert fallback == "CPUExecutionProvider"


@pytest.mark.parametrize("content", [b"", b"not a graph" * 50, None])
def test_broken_file(bundle: Make, runtime: str, content: bytes | None) -> None:
    made, engine = bundle(), engine_record(runtime)
    path = made.root / "tiny.onnx"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    words = rf"{RUNTIMES[runtime]} cannot open tiny \(.*tiny.onnx\)"
    with pytest.raises(EngineError, match=words):
        runtimes(runtime)[0].open("tiny", record(engine), engine, made.root, EngineOptions())


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_libraries_that_are_missing_are_named(
    bundle: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if OnnxRuntime().availability("cuda").ok:
        pytest.skip("this machine has a GPU")
    said = "Failed to load libcudart.so.13: no such file"
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda msvc: print(said + "\nSee the page"))
    cuda = engine_record(target="cuda")
    with pytest.raises(EngineError, match=f"or use a bundle for the CPU. {said}$"):
        OnnxRuntime().open("tiny", record(cuda), cuda, bundle().root, EngineOptions())
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_never_falls_back_to_the_cpu_in_silence(bundle: Make) -> None:
    """The runtime itself only warns where its CUDA provider cannot start."""
    runtime = OnnxRuntime()
    if runtime.availability("cuda").ok:
        pytest.skip("this machine has a GPU")
    made = bundle()
    cuda = engine_record(target="cuda")
    with pytest.raises(EngineError, match="could not start its CUDAExecutionProvider for tiny"):
        runtime.open("tiny", record(cuda), cuda, made.root, EngineOptions())


def test_bfloat16_becomes_float32_on_the_cpu_alone() -> None:
    runtime = OnnxRuntime()
    assert runtime.precision("cpu", "bf16") == "fp32"
    assert runtime.precision("cpu", "fp16") == "fp16"
    assert runtime.precision("cuda", "bf16") == "bf16"
    assert runtime.version()


@pytest.mark.parametrize(
    ("sets", "narrow"),
    [
        (["avx2", "avx512_vnni"], "fp32"),
        (["avx512_bf16"], "bf16"),
        (["amx_bf16"], "bf16"),
        (["bf16"], "bf16"),
    ],
)
def test_openvino_has_bfloat16_where_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, sets: list[str], narrow: str
) -> None:
    monkeypatch.setattr("engines.openvino.describe_cpu", lambda: {"instruction_sets": sets})
    runtime = OpenVino()
    assert [runtime.precision("cpu", name) for name in ("fp32", "bf16", "int8")] == [
        "fp32",
        narrow,
        "int8",
    ]
    assert runtime.compute("cpu", "int8") == narrow
    assert runtime.compute("cpu", "fp32") == "fp32"
    # A graph in bfloat16 would round in between what is computed in float32 all the same.
    assert {runtime.precision("cpu", "bf16", n) for n in ("clip", "t5", "conditioner")} == {"fp32"}
    assert runtime.precision("cpu", "bf16", "vae_decoder") == narrow


def test_openvino_takes_no_fp8() -> None:
    runtime = OpenVino()
    assert runtime.precision_problem("cpu", "int8") is None
    assert runtime.precision_problem("cpu", "int4-weights") is None
    for name in ("fp8", "fp16", "int8-dynamic"):
        assert f"no {name} on CPUs; use fp32" in str(runtime.precision_problem("cpu", name))


@pytest.mark.parametrize(
    ("precision", "vnni", "qdq", "slow", "level"),
    [
        ("fp32", False, "", "", ""),
        ("fp8", True, "1", "", ""),
        ("fp8-weights", False, "1", "", ""),
        ("int8-dynamic", True, "", "", ""),
        ("int8-dynamic", False, "", "1", ""),
        ("int8-weights", False, "", "", ""),
        ("int4-weights", False, "", "", "1"),
        ("of-a-later-version", False, "", "", ""),
    ],
)
def test_what_a_session_is_told(
    bundle: Make,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    vnni: bool,
    qdq: str,
    slow: str,
    level: str,
) -> None:
    made = bundle()
    tiny = made.manifest.components["tiny"]
    made.manifest.components["tiny"] = replace(tiny, precision=precision)
    monkeypatch.setattr(module, "_has_vnni", lambda: vnni)
    engine: Any = open_engine(made, "tiny")
    options = engine.session.get_session_options()

    def entry(name: str) -> str:
        try:
            return str(options.get_session_config_entry(f"session.{name}"))
        except RuntimeError:  # not set
            return ""

    assert entry("force_spinning_stop") == "1"
    assert entry("intra_op.spin_duration_us") == "100"
    assert (entry("disable_quant_qdq"), entry("x64quantprecision")) == (qdq, slow)
    assert entry("qdq_matmulnbits_accuracy_level") == level


@pytest.mark.parametrize(
    ("target", "precision", "compute", "fused"),
    [
        ("cpu", "fp32", "fp32", True),
        ("cpu", "fp16", "fp16", False),
        ("cuda", "bf16", "bf16", True),
        ("cpu", "fp8-linears", "fp32", True),
        ("cpu", "fp8", "fp32", False),
        ("cuda", "fp8", "fp16", False),
    ],
)
def test_where_attention_is_an_operator(
    target: str, precision: str, compute: str, fused: bool
) -> None:
    kernels = AttentionKernels.ONNX_RUNTIME if fused else AttentionKernels.PLAIN
    assert OnnxRuntime().attention(target, precision, compute) is kernels


def test_only_dynamic_integers_and_int4_stay_narrow_in_memory() -> None:
    narrow = [name for name in PRECISIONS if not OnnxRuntime().widens_weights("cpu", name)]
    assert narrow == ["fp32", "bf16", "fp16", "int8-dynamic", "int4-weights"]
    assert OpenVino().widens_weights("cpu", "int8-weights")
    assert not OpenVino().widens_weights("cpu", "int4-weights")
    assert not TensorRt().widens_weights("sm89", "fp8-weights")


@pytest.mark.parametrize(
    ("component", "compute", "capable", "hint"),
    [
        ("transformer", "bf16", True, "bf16"),
        ("vae_decoder", "bf16", True, "bf16"),
        ("transformer", "fp32", True, "f32"),
        ("transformer", "bf16", False, "f32"),
        ("clip", "bf16", True, "f32"),
        ("t5", "bf16", True, "f32"),
        ("conditioner", "bf16", True, "f32"),
    ],
)
def test_what_openvino_computes_in(
    monkeypatch: pytest.MonkeyPatch, component: str, compute: str, capable: bool, hint: str
) -> None:
    told: dict[str, Any] = {}

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "BF16"] if capable else ["FP32"]

        def read_model(self, path: Path) -> None:
            pass

        def compile_model(self, model: None, device: str, settings: dict[str, Any]) -> Any:
            told.update(settings)
            return SimpleNamespace(inputs=(), outputs=())

    monkeypatch.setattr(openvino_module, "_core", Core)
    monkeypatch.setattr(openvino_module, "check_boundary", lambda *_: None)
    engine = engine_record("openvino")
    described = replace(record(engine), compute=compute)
    OpenVino().open(component, described, engine, Path(), EngineOptions())
    assert told["INFERENCE_PRECISION_HINT"] == hint
    assert told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0


@pytest.mark.parametrize("precision", ["fp8", "fp8-linears", "fp8-weights"])
def test_fp8_is_emulated_on_a_cpu_alone(precision: str) -> None:
    assert OnnxRuntime().emulates("cpu", precision)
    assert not OnnxRuntime().emulates("cuda", precision)
    assert not TensorRt().emulates("sm89", precision)


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int4-weights"])
def test_what_a_cpu_computes_in_is_not_emulated(precision: str) -> None:
    assert not OnnxRuntime().emulates("cpu", precision)
    assert not OpenVino().emulates("cpu", precision)
