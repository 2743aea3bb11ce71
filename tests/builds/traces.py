"""Tracing, which is nearly all the time of a small build, done once and remembered on the disk.

Everything else of a build stays real. `python -m tests.builds.traces TRACES DESTINATION` builds the
default checkpoint without shortcuts and leaves its traces for the tests.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import onnx
import onnx_ir as ir

import exporters.export
from exporters.components.chain import Chain
from exporters.graph.trace import trace_chain
from fluxdeploy.build.resolve import BuildRequest
from tests.conftest import SharedFolder, build_bundle


class Traces:
    """Takes the place of `exporters.export.trace_chain`; `components` lists its calls."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._folder = SharedFolder(root)
        self.components: list[str] = []

    def __call__(self, chain: Chain) -> ir.Model:
        self.components.append(chain.component)

        def trace(folder: Path) -> None:
            folder.mkdir()
            model = trace_chain(chain)
            (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())

        entry = self._folder.entry(f"{chain.component}-{_digest(chain)}", trace)
        return ir.from_proto(onnx.load(entry / "model.onnx"))


def _digest(chain: Chain) -> str:
    """Of all that decides a chain's graph, for chains of one version of the exporters."""
    stages = [
        (
            stage.reads,
            stage.writes,
            stage.scope,
            stage.piece.inputs,
            str(stage.piece.module),
            [(n, p.shape, p.dtype) for n, p in stage.piece.module.named_parameters()],
        )
        for stage in chain.stages
    ]
    return hashlib.sha256(repr((chain.inputs, chain.outputs, stages)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    exporters.export.trace_chain = Traces(Path(sys.argv[1]))
    build_bundle(BuildRequest(), Path(sys.argv[2]))
