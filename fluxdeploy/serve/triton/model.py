"""The model `flux`, as Triton's Python backend runs it: `model.py` of a repository imports it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.base import EngineOptions
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.files import disk_errors, read_whole
from fluxdeploy.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST
from fluxdeploy.bundle.manifest_json import from_json
from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.turns import QueueLimits
from fluxdeploy.serve.triton.calls import Calls
from fluxdeploy.serve.triton.config import Settings, triton_edition
from fluxdeploy.serve.triton.engine import TritonEngine
from fluxdeploy.serve.triton.metrics import Metrics
from fluxdeploy.text import load_tokenizers

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """Takes requests and answers them later, previews first. Ready once its engines have run."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle in the version's folder, and draw a picture."""
        import triton_python_backend_utils as pb

        try:
            self._open(pb, args)
        except FluxDeployError as error:
            raise pb.TritonModelException(str(error)) from error

    def _open(self, pb: Any, args: Mapping[str, str]) -> None:
        given = json.loads(args["model_config"])["parameters"]
        parameters = {name: each["string_value"] for name, each in given.items()}
        settings = Settings.read(parameters)
        root = Path(args["model_repository"], args["model_version"], "bundle").absolute()
        limits = QueueLimits(settings.max_waiting, settings.max_memory)
        if parameters.get("form") == "bls":
            # Models cannot be called while one is made: those of the components warm up themselves.
            self._pipeline = _on_models(pb, root, limits)
        else:
            options = EngineOptions(settings.threads, settings.device)
            self._pipeline = FluxPipeline.from_bundle(
                root, settings.runtime, options, limits=limits
            )
            self._pipeline.warm_up()
        metrics = Metrics(pb, self._pipeline.stats)
        self._calls = Calls(pb, self._pipeline, metrics, settings.default_timeout_seconds)

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin each request; the host's queue says when it runs."""
        for request in requests:
            self._calls.start(request)

    def finalize(self) -> None:
        """End what is left, and free the engines."""
        self._calls.close()
        self._pipeline.close()


def _on_models(pb: Any, root: Path, limits: QueueLimits) -> FluxPipeline:
    """A pipeline whose components are models of this server; the files of theirs are not here."""
    path = root / MANIFEST_NAME
    with disk_errors("read", path):
        data = read_whole(path, MAX_MANIFEST)
    manifest = from_json(data.decode("utf-8"), str(path))
    whole = Bundle(root, manifest, hashlib.sha256(data).hexdigest())
    bundle = triton_edition(whole, "bls")
    open_component = functools.partial(TritonEngine, pb, bundle.manifest)
    return FluxPipeline(bundle, load_tokenizers(bundle), open_component, limits=limits)
