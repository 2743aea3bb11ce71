"""FLUX.1 image models without PyTorch: `FluxPipeline` makes pictures from a bundle.

Importing this package is cheap: the pipeline and NumPy are loaded on first use.
"""

from __future__ import annotations

import os
from importlib import import_module

TYPE_CHECKING = False  # `typing` is not imported, so that Ctrl-C meets nothing before `cli`
if TYPE_CHECKING:
    from fluxdeploy.host.cancel import CancelToken
    from fluxdeploy.host.pipeline import FluxPipeline, FluxPipelineOutput

__all__ = ["CancelToken", "FluxPipeline", "FluxPipelineOutput", "__version__"]

__version__ = "0.1.0"

# Read when the libraries are imported, and all of ours that import them import this package first:
# ONNX Runtime would keep a device id and a database of events, the hub's library tell of models,
# and Ray of clusters. Who has set them keeps what was set.
for _switch, _off in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_switch, _off)

_HOMES = {
    "CancelToken": "fluxdeploy.host.cancel",
    "FluxPipeline": "fluxdeploy.host.pipeline",
    "FluxPipelineOutput": "fluxdeploy.host.pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
