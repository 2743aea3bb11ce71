"""optimum-onnx's pipeline: its own ONNX files of a checkpoint, exported once, and opened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxdeploy.bench.job import Job
from fluxdeploy.bench.peers.conversion import convert_in_process

__all__ = ["optimum_loader"]


def optimum_loader(job: Job) -> Callable[[], Any]:
    """What opens an `ORTFluxPipeline` of the job's checkpoint, with all imports done.

    The first process of a job exports it, in a process of its own: that memory is not the
    pipeline's. Raises `EngineError` where the export fails.
    """
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTFluxPipeline

    folder = Path(job.folder) / "optimum"
    if not folder.is_dir():
        failure = f"optimum-onnx cannot export {job.checkpoint}"
        convert_in_process("fluxdeploy.bench.peers.optimum", job.checkpoint, folder, failure)
    options = SessionOptions()
    options.intra_op_num_threads = job.threads
    where: dict[str, Any] = {"provider": "CPUExecutionProvider"}
    if job.device != "cpu":
        choices = {"device_id": job.gpu}
        where = {"provider": "CUDAExecutionProvider", "provider_options": choices}
    return lambda: ORTFluxPipeline.from_pretrained(
        folder, export=False, session_options=options, **where
    )


def _main(checkpoint: str, folder: str) -> None:
    from optimum.onnxruntime import ORTFluxPipeline

    ORTFluxPipeline.from_pretrained(checkpoint, export=True).save_pretrained(folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
