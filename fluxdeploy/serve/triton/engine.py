"""An engine that is a model of the same Triton server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engines.base import Array, Binding, Engine
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import EngineError
from fluxdeploy.serve.triton.config import component_model, triton_engines

__all__ = ["TritonEngine"]

_DTYPES = {"float32": np.float32, "int32": np.int32}


class TritonEngine(Engine):
    """A component that a model of its own runs, called from within `flux`.

    pb: Triton's `triton_python_backend_utils`.
    """

    def __init__(self, pb: Any, manifest: Manifest, component: str) -> None:
        record = manifest.components[component]
        (engine, *_) = triton_engines(component, record).records
        super().__init__(component, record.inputs, record.outputs, engine.dimensions)
        self._pb: Any | None = pb

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        pb = self._while_open(self._pb)
        known = {spec.name: spec for spec in self.inputs}
        if inputs.keys() != known.keys():
            raise EngineError(
                f"{self.component} takes {', '.join(known)}, not {', '.join(inputs) or 'nothing'}."
            )
        request = pb.InferenceRequest(
            model_name=component_model(self.component),
            requested_output_names=[spec.name for spec in self.outputs],
            inputs=[
                pb.Tensor(name, np.ascontiguousarray(values, _DTYPES[known[name].dtype]))
                for name, values in inputs.items()
            ],
            # On a device it could not be read as an array.
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU),
        )
        try:
            response = request.exec()
        except pb.TritonModelException as error:
            raise self._failed(str(error)) from error
        if response.has_error():
            raise self._failed(response.error().message())
        return {
            spec.name: self._output(pb.get_output_tensor_by_name(response, spec.name), spec.name)
            for spec in self.outputs
        }

    def _output(self, tensor: Any, name: str) -> Array:
        if tensor is None:
            raise self._failed(f"it gave no {name}")
        # A copy: the response's memory is Triton's.
        values: Array = np.array(tensor.as_numpy())
        return values

    def _failed(self, why: str) -> EngineError:
        model = component_model(self.component)
        return EngineError(f"Triton's model {model} failed: {why}. See the server's log.")

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        self._while_open(self._pb)
        return _Binding(self, {name: np.array(values) for name, values in resident.items()})

    def close(self) -> None:
        self._pb = None


class _Binding(Binding):
    """Sends the inputs that stay with every call: models of a server have no other way."""

    def __init__(self, engine: TritonEngine, resident: Mapping[str, Array]) -> None:
        self._engine = engine
        self._resident = resident

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._engine.run({**self._resident, **inputs})
