"""The configurations (`config.pbtxt`) of a repository's models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, Manifest, TensorSpec
from fluxdeploy.bundle.typed_json import to_plain
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.serve.triton.fields import INPUTS, MODEL, OUTPUTS, Field
from fluxdeploy.serve.triton.pbtxt import Enum, Value, render

if TYPE_CHECKING:
    from fluxdeploy.bundle import Bundle

__all__ = [
    "FORMS",
    "HEADER",
    "Form",
    "Settings",
    "TritonEngines",
    "component_config",
    "component_model",
    "pipeline_config",
    "plan_name",
    "triton_edition",
    "triton_engines",
]

Form = Literal["pipeline", "bls"]

FORMS: tuple[Form, ...] = get_args(Form)
"""The host with the engines in one model, or with a model for each component."""

HEADER = "Written by `fluxdeploy triton`"
"""How the configuration of `flux` begins."""

_ABOUT = f"""\
{HEADER}: FLUX.1 with its host in Python.
README.md beside this folder tells how to use it.

Each request is a call of its own, with its own size: there is no common batch axis, and so no
max_batch_size. Responses come one by one: previews, steps, and the pictures."""

_QUEUE = """\
The queue. Triton's own is always empty, since the model takes every request at once, and this file
asks for no dynamic_batching. The host's queue is the real one: it knows what a request costs, lets
calls change places between two steps, by `priority` and fair shares, and refuses (UNAVAILABLE)
where `max_waiting` calls wait. A request's `timeout` (microseconds) ends it, waiting or running,
as cancelling it does; `default_timeout_seconds` is that of a request without one, 0 for none.
max_memory is what begun calls may hold together, in bytes; empty for no limit.

One instance: engines and prompts are shared by all calls, and a second copy would double them."""

_ENGINES = """\
What runs the engines, as `fluxdeploy generate --runtime --device --threads`; empty for a choice of
its own."""

_BUNDLE = """\
The manifest of the bundle, for clients that have no bundle, such as `fluxdeploy serve`. The model
itself reads the bundle in its version's folder."""

_COMPONENT = f"""\
{HEADER}: a component of FLUX.1, which `{MODEL}` calls. All axes are in
the shapes, and so there is no max_batch_size. One instance: an engine's calls take turns, and
memory holds it once."""

_DTYPES = {"float32": "FP32", "int32": "INT32"}


@dataclass(frozen=True)
class Settings:
    """How the model `flux` runs: what its configuration's parameters say.

    runtime, device, threads: as `EngineOptions` and `FluxPipeline.from_bundle` have them.
    max_waiting, max_memory: the host's `QueueLimits`.
    default_timeout_seconds: of requests that have none of their own; 0 for none.
    """

    runtime: str = "auto"
    device: int = 0
    threads: int | None = None
    max_waiting: int | None = 64
    max_memory: int | None = None
    default_timeout_seconds: float = 0.0

    @classmethod
    def read(cls, parameters: Mapping[str, str]) -> Settings:
        """Of the parameters of a configuration, which people edit. Raises `UsageError`."""
        try:
            return cls(
                parameters.get("runtime") or "auto",
                int(parameters.get("device") or 0),
                _integer(parameters.get("threads")),
                _integer(parameters.get("max_waiting")),
                _integer(parameters.get("max_memory")),
                float(parameters.get("default_timeout_seconds") or 0),
            )
        except ValueError as error:
            raise UsageError(f"A parameter of config.pbtxt is no number: {error}.") from error

    def parameters(self, *names: str) -> Mapping[str, Value]:
        """Those of the names, as fields of a configuration."""
        values = asdict(self)
        return _parameters({n: "" if values[n] is None else str(values[n]) for n in names})


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _parameters(values: Mapping[str, str]) -> Mapping[str, Value]:
    return {
        "parameters": tuple(
            {"key": key, "value": {"string_value": value}} for key, value in values.items()
        )
    }


def pipeline_config(manifest: Manifest, bundle_hash: str, form: Form, settings: Settings) -> str:
    """The configuration of the model `flux`."""
    engines: list[tuple[str, Mapping[str, Value]]] = []
    if form == "pipeline":
        engines = [(_ENGINES, settings.parameters("runtime", "device", "threads"))]
    about = {
        "form": form,
        "bundle_hash": bundle_hash,
        "manifest": json.dumps(to_plain(manifest), separators=(",", ":")),
    }
    return render(
        [
            (
                _ABOUT,
                {
                    "name": MODEL,
                    "backend": "python",
                    "max_batch_size": 0,
                    "model_transaction_policy": {"decoupled": True},
                },
            ),
            (
                _QUEUE,
                {
                    "instance_group": {"kind": Enum("KIND_CPU"), "count": 1},
                    **settings.parameters("max_waiting", "max_memory", "default_timeout_seconds"),
                },
            ),
            *engines,
            (
                "What a request may hold.",
                {"input": tuple(_field(each, each.name != "prompt") for each in INPUTS)},
            ),
            ("What a response holds.", {"output": tuple(_field(each) for each in OUTPUTS)}),
            (_BUNDLE, _parameters(about)),
        ]
    )


def _field(field: Field, optional: bool = False) -> Mapping[str, Value]:
    kind = Enum(f"TYPE_{field.dtype}")
    shape: dict[str, Value] = {"name": field.name, "data_type": kind, "dims": field.dims}
    return {**shape, "optional": True} if optional else shape


@dataclass(frozen=True)
class TritonEngines:
    """The engines of a component that one of Triton's backends runs.

    backend: `onnxruntime` or `tensorrt`. records: one, or one for each compute capability.
    """

    backend: str
    records: tuple[EngineRecord, ...]


def triton_edition(bundle: Bundle, form: Form) -> Bundle:
    """What of a bundle for several runtimes the models of a repository are made of.

    The model `flux` alone picks by itself, where it is started. Models of the components take the
    best edition that Triton has backends for. Raises `BundleError` where there is none.
    """
    if form == "pipeline" or not bundle.manifest.editions:
        return bundle
    editions = {each.manifest.runtime: each for each in bundle.editions}
    for runtime in ("tensorrt", "onnxruntime"):
        if runtime in editions:
            return editions[runtime]
    raise BundleError(
        f"The bundle {bundle.root} has editions for {', '.join(editions)}, and Triton has backends "
        "for onnxruntime and tensorrt. Use --form pipeline, which runs every bundle."
    )


def triton_engines(component: str, record: ComponentRecord) -> TritonEngines:
    """The best engines of a component for Triton. Raises `BundleError` where it has none."""
    plans = tuple(each for each in record.engines if each.runtime == "tensorrt")
    if plans:
        return TritonEngines("tensorrt", plans)
    graphs = [each for each in record.engines if each.runtime == "onnxruntime"]
    if graphs:
        # One file, whatever the device: the GPU's record comes first, if there is one.
        return TritonEngines(
            "onnxruntime", tuple(sorted(graphs, key=lambda e: e.target == "cpu")[:1])
        )
    built = ", ".join(sorted({each.runtime for each in record.engines})) or "nothing"
    raise BundleError(
        f"The bundle's {component} has engines for {built}, and Triton has backends for "
        "onnxruntime and tensorrt. Use --form pipeline, which runs every bundle."
    )


def component_model(component: str) -> str:
    """The name of the model of a component."""
    return f"{MODEL}_{component}"


def component_config(component: str, record: ComponentRecord, engines: TritonEngines) -> str:
    """The configuration of a component's model."""
    first = engines.records[0]
    tensorrt = engines.backend == "tensorrt"
    on_gpu = tensorrt or first.target != "cpu"
    fields: dict[str, Value] = {
        "name": component_model(component),
        "platform": "tensorrt_plan" if tensorrt else "onnxruntime_onnx",
        "max_batch_size": 0,
        "instance_group": {"kind": Enum("KIND_GPU" if on_gpu else "KIND_CPU"), "count": 1},
        "input": tuple(_tensor(spec) for spec in record.inputs),
        "output": tuple(_tensor(spec) for spec in record.outputs),
    }
    if tensorrt:
        fields["default_model_filename"] = plan_name(first)
        fields["cc_model_filenames"] = tuple(
            {"key": _capability(each.target), "value": plan_name(each)} for each in engines.records
        )
        # Where a plan has several profiles, scratch memory is that of the one in use.
        fields |= _parameters({"execution_context_allocation_strategy": "ON_PROFILE_CHANGE"})
    warmup: dict[str, Value] = {
        spec.name: {
            "data_type": Enum(f"TYPE_{_DTYPES[spec.dtype]}"),
            "dims": tuple(
                first.dimensions[size].opt if isinstance(size, str) else size for size in spec.shape
            ),
            "zero_data": True,
        }
        for spec in record.inputs
    }
    fields["model_warmup"] = {
        "name": "the size that it is tuned for",
        "batch_size": 1,
        "inputs": tuple({"key": name, "value": value} for name, value in warmup.items()),
    }
    return render([(_COMPONENT, fields)])


def plan_name(record: EngineRecord) -> str:
    """The name of a plan in its model's folder."""
    return f"model.{record.target}.plan"


def _capability(target: str) -> str:
    """`8.9` of `sm89`, `12.0` of `sm120`."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1:]}"


def _tensor(spec: TensorSpec) -> Mapping[str, Value]:
    dims = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
    return {
        "name": spec.name,
        "data_type": Enum(f"TYPE_{_DTYPES[spec.dtype]}"),
        "dims": dims,
    }
