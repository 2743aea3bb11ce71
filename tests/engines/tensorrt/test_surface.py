"""The adapter against what the bindings of TensorRT 10 and 11 have, which are not installed here.

`surface.json` holds the names and the signatures that were read from wheels of the bindings, and
how often each of their callbacks was called with what. Of TensorRT-RTX and of cuda-python, what is
installed is asked too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engines.tensorrt.runtime import TensorRtRtx
from tests.engines.tensorrt.surface import (
    Surface,
    callbacks,
    describe_cuda,
    problem,
    recorded,
)
from tests.engines.tensorrt.test_loaded import Library, load
from tests.engines.tensorrt.uses import cuda_uses, uses, uses_of

ROOT = Path(__file__).parents[3]
RECORDED = recorded()
TENSORRT = [version for version in RECORDED if version.startswith("tensorrt ")]
RTX = [version for version in RECORDED if version.startswith("tensorrt_rtx ")]
CUDA = [version for version in RECORDED if version.startswith("cuda ")]

RTX_ALONE = {
    "ComputeCapability",
    "EngineValidity",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "Runtime.engine_header_size",
    "Runtime.get_engine_validity",
}
"""What the adapter uses where it is there, or with TensorRT-RTX."""


def problems(names: Any, called_back: Any, *without: str) -> list[str]:
    found = uses(names)
    assert len(found) > 100
    told = (problem(use, names, called_back) for use in found if use.name not in without)
    return [words for words in told if words]


@pytest.mark.parametrize("version", TENSORRT)
def test_what_the_adapter_uses_of_tensorrt_is_there(version: str) -> None:
    known = RECORDED[version]
    assert not problems(known["names"], known["callbacks"], *RTX_ALONE)
    assert not RTX_ALONE & known["names"].keys(), "no longer TensorRT-RTX's alone"


@pytest.mark.parametrize("version", RTX)
def test_what_the_adapter_uses_of_tensorrt_rtx_is_there(version: str) -> None:
    assert not problems(RECORDED[version]["names"], RECORDED[version]["callbacks"])


@pytest.mark.parametrize("version", [*TENSORRT, *RTX])
def test_a_reader_may_give_less_than_is_asked_for(version: str) -> None:
    """10.8 takes the first piece for the whole."""
    assert RECORDED[version]["callbacks"]["IStreamReaderV2.read"].endswith("in pieces")


def test_the_tensorrt_rtx_that_is_installed() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    called_back = RECORDED[RTX[-1]]["callbacks"] | callbacks(trt)
    assert called_back == RECORDED[RTX[-1]]["callbacks"]
    assert not problems(Surface(trt), called_back)
    for target in TensorRtRtx.targets:
        assert hasattr(trt.ComputeCapability, target.upper())


@pytest.mark.parametrize("version", [*CUDA, "installed"])
def test_what_the_adapter_uses_of_cuda_is_there(version: str) -> None:
    if version == "installed":
        reason = "cuda-python is not installed"
        names = describe_cuda(pytest.importorskip("cuda.bindings.runtime", reason=reason))
    else:
        names = RECORDED[version]["names"]
    found = cuda_uses()
    assert len({use.name for use in found}) > 20
    assert not [words for use in found if (words := problem(use, names, {}))]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16 is not there"),
        ("builder.build_engine(network, config)", "Builder.build_engine is not there"),
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size is not there"),
        ("network.get_input(0).nmae", "ITensor.nmae is not there"),
        ("runtime.deserialize_cuda_engine(b'').num_io", "ICudaEngine.num_io is not there"),
        ("network.num_inputs = 1", "INetworkDefinition.num_inputs cannot be written"),
        ("builder.build_serialized_network(config, network)", "('IBuilderConfig', 'INetworkD"),
        ("builder.build_serialized_network(network)", "is given ('INetworkDefinition',) ()"),
        ("builder.create_network(flag=1)", "is given () ('flag',)"),
        ("config.set_flag(trt.MemoryPoolType.WORKSPACE)", "is given ('MemoryPoolType',)"),
        ("[c.type_ for c in [network.get_layer(0)]]", "ILayer.type_ is not there"),
        ("smallest, _, _ = engine.get_tensor_profile_shape('x')", "is given (None,)"),
        (
            "class L(trt.ILogger):\n  def log(self, msg: str): ...",
            "ILogger.log is called back with 2 arguments",
        ),
        (
            "class R(trt.IStreamReaderV2):\n  def read(self, to: int, size: int, s: int): ...",
            "IStreamReaderV2.read is called back with 2 arguments, in pieces",
        ),
    ],
)
@pytest.mark.parametrize("version", [TENSORRT[0], TENSORRT[-1]])
def test_wrong_uses_are_told(source: str, words: str, version: str) -> None:
    known = RECORDED[version]
    given = "trt, builder, network, config, runtime, engine".replace(",", ": Any,") + ": Any"
    body = "\n".join(f"  {line}" for line in source.splitlines())
    found = uses_of("x.py", f"def f({given}):\n{body}", known["names"])
    told = [problem(use, known["names"], known["callbacks"]) for use in found]
    assert any(words in (line or "") for line in told), told


def test_an_object_of_the_library_cannot_enter_unseen() -> None:
    with pytest.raises(KeyError, match="inspector is Any"):
        uses_of("x.py", "def f(inspector: Any): ...", {})
    with pytest.raises(KeyError, match="_make_inspector is Any"):
        uses_of("x.py", "def _make_inspector() -> Any: ...", {})


def test_the_pretended_library_offers_what_the_real_ones_have(tmp_path: Path) -> None:
    path = tmp_path / "tiny.engine"
    path.write_bytes(bytes(4096))
    library = Library()
    loaded: Any = load(library, path)
    names = RECORDED[RTX[-1]]["names"]
    for owner, kind in (
        ("Runtime", library.Runtime),
        ("ICudaEngine", type(library.engine)),
        ("IExecutionContext", type(loaded._context)),
    ):
        offered = {f"{owner}.{name}" for name in vars(kind) if not name.startswith("_")}
        assert offered
        assert offered <= names.keys()


@pytest.mark.parametrize(
    ("package", "versions"), [("tensorrt", TENSORRT), ("tensorrt-rtx", RTX), ("cuda-python", CUDA)]
)
def test_the_oldest_versions_that_install_are_recorded(package: str, versions: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = set(re.findall(rf'"{package}>=(\d+\.\d+)', text))
    assert floors == {".".join(versions[0].split()[1].split(".")[:2])}


def test_the_readme_names_the_versions_that_are_recorded() -> None:
    first, last = (".".join(v.split()[1].split(".")[:2]) for v in (TENSORRT[0], TENSORRT[-1]))
    assert (first[:3], last[:3]) == ("10.", "11.")
    assert (ROOT / "README.md").read_text(encoding="utf-8").count(f"{first} to {last}") == 1
