"""Contenders that are bundles: our host over the bundle's own engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import EngineOptions, choose_edition, open_engine
from engines.base import Array, Engine
from fluxdeploy.bench.contender import LoadedContender
from fluxdeploy.bench.job import Job
from fluxdeploy.bench.stopwatch import Stopwatch
from fluxdeploy.bench.timed_engine import TimedEngine
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.errors import BundleError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.text import load_tokenizers

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BundleContender"]


class BundleContender(LoadedContender):
    """`FluxPipeline`, with a stopwatch between it and its engines."""

    def __init__(self, job: Job, watch: Stopwatch) -> None:
        super().__init__(job, watch)
        with watch.component("load"):
            bundle = choose_edition(open_bundle(Path(job.bundle)), job.runtime)
            if bundle.content_hash != job.bundle_hash:
                raise BundleError(
                    f"The bundle {bundle.root} was replaced since `bench` has opened it; run it "
                    "again."
                )
            # A prompt that was kept would cost nothing the next time; the peers keep none.
            self._pipe = FluxPipeline(
                bundle, load_tokenizers(bundle), self._opener(bundle), kept_text_bytes=0
            )

    def _call(self, **arguments: Any) -> list[Image]:
        if not self._pipe.bundle.manifest.guidance_embedding:
            del arguments["guidance_scale"]
        images = self._pipe(
            **arguments,
            seed=self._job.seed,
            callback_on_step_end=lambda *_: self._watch.end_step(),
        ).images
        assert isinstance(images, list)  # output_type is "pil"
        return images

    def _opener(self, bundle: Bundle) -> Callable[[str], Engine]:
        options = EngineOptions(self._job.threads, self._job.gpu)

        def open_timed(component: str) -> Engine:
            with self._watch.component("load"):
                engine = open_engine(bundle, component, self._job.runtime, options)
            return TimedEngine(engine, self._watch, self._keep)

        return open_timed

    def _keep(self, outputs: Mapping[str, Array]) -> None:
        if "velocity" in outputs:
            self._keep_first(lambda: outputs["velocity"])
