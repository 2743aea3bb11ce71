"""The TensorRT backend compiles against declarations whose names are those of the bindings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.engines.cpp.conftest import ROOT

CPP = ROOT / "engines" / "cpp"
DECLARATIONS = CPP / "tests" / "declarations"
SURFACE = ROOT / "tests" / "engines" / "tensorrt" / "surface.json"

BINDINGS = {
    "ICudaEngine.createExecutionContext": "ICudaEngine.create_execution_context",
    "ICudaEngine.getIOTensorName": "ICudaEngine.get_tensor_name",
    "ICudaEngine.getNbIOTensors": "ICudaEngine.num_io_tensors",
    "ICudaEngine.getNbOptimizationProfiles": "ICudaEngine.num_optimization_profiles",
    "ICudaEngine.getProfileShape": "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.getStreamableWeightsSize": "ICudaEngine.streamable_weights_size",
    "ICudaEngine.getTensorDataType": "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.getTensorIOMode": "ICudaEngine.get_tensor_mode",
    "ICudaEngine.getTensorShape": "IExecutionContext.get_tensor_shape",
    "ICudaEngine.getWeightStreamingAutomaticBudget": (
        "ICudaEngine.get_weight_streaming_automatic_budget"
    ),
    "ICudaEngine.setWeightStreamingBudgetV2": "ICudaEngine.weight_streaming_budget_v2",
    "IExecutionContext.enqueueV3": "IExecutionContext.execute_async_v3",
    "IExecutionContext.getOptimizationProfile": "IExecutionContext.active_optimization_profile",
    "IExecutionContext.getTensorShape": "IExecutionContext.get_tensor_shape",
    "IExecutionContext.setDeviceMemoryV2": "IExecutionContext.set_device_memory",
    "IExecutionContext.setInputShape": "IExecutionContext.set_input_shape",
    "IExecutionContext.setOptimizationProfileAsync": (
        "IExecutionContext.set_optimization_profile_async"
    ),
    "IExecutionContext.setTensorAddress": "IExecutionContext.set_tensor_address",
    "IExecutionContext.updateDeviceMemorySizeForShapes": (
        "IExecutionContext.update_device_memory_size_for_shapes"
    ),
    "ILogger.log": "ILogger.log",
    "IRuntime.deserializeCudaEngine": "Runtime.deserialize_cuda_engine",
    "IStreamReaderV2.read": "IStreamReaderV2.read",
    "IStreamReaderV2.seek": "IStreamReaderV2.seek",
}
"""What the bindings call each function."""


def test_each_declared_function_is_one_that_the_bindings_have() -> None:
    text = (DECLARATIONS / "NvInfer.h").read_text()
    declared = {
        f"{kind}.{function}"
        for kind, body in re.findall(r"class (I\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL)
        for function in re.findall(r"^    [^~\n]*?(\w+)\([^)]*\)[^;]*;", body, re.MULTILINE)
    }
    assert declared == set(BINDINGS)
    assert set(BINDINGS.values()) <= set(json.loads(SURFACE.read_text())["names"])


@pytest.mark.parametrize("definition", ["FLUXDEPLOY_TENSORRT_ALONE", "FLUXDEPLOY_RTX"])
def test_the_backend_compiles(definition: str) -> None:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    folders = ["-I", str(CPP / "src"), "-I", str(DECLARATIONS), "-D", definition]
    source = str(CPP / "src" / "backends" / "tensorrt.cpp")
    done = subprocess.run([*command, *folders, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
