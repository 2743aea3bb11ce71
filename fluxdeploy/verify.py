"""Verifying: a bundle's files, its engines, and its pictures held against PyTorch float32."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import Engine, EngineOptions, open_engine
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import UsageError
from fluxdeploy.gate import PICTURE_GATES, Deviation, measure_component
from fluxdeploy.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from fluxdeploy.source import hash_checkpoint, open_source
from fluxdeploy.text import load_tokenizers

__all__ = ["ComponentReport", "PictureReport", "VerifyReport", "verify"]

_PROMPT = "a red circle above a blue square"
_SEED = 0
_STEPS = 4
_SIDE = 256
"""The picture compared: small enough for float32 on a CPU, large enough to show a mistake."""


@dataclass(frozen=True)
class ComponentReport:
    """A component's engine against its golden tensors."""

    name: str
    precision: str
    deviation: Deviation
    passed: bool


@dataclass(frozen=True)
class PictureReport:
    """A picture of the bundle against the same picture in PyTorch. `max_difference` of 255."""

    psnr: float
    max_difference: float
    required_psnr: float

    @property
    def passed(self) -> bool:
        """Whether the picture is within its gate."""
        return self.psnr >= self.required_psnr


@dataclass(frozen=True)
class VerifyReport:
    """All that was compared. `picture` is None where no checkpoint was given."""

    bundle_hash: str
    components: tuple[ComponentReport, ...]
    picture: PictureReport | None

    @property
    def passed(self) -> bool:
        """Whether everything is within its gate."""
        pictures = () if self.picture is None else (self.picture,)
        return all(report.passed for report in (*self.components, *pictures))

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        picture = self.picture
        return {
            "bundle_hash": self.bundle_hash,
            "passed": self.passed,
            "components": [asdict(component) for component in self.components],
            "picture": None if picture is None else {**asdict(picture), "passed": picture.passed},
        }


def verify(
    path: Path,
    checkpoint: str | None,
    runtime: str,
    options: EngineOptions,
    progress: Progress,
) -> VerifyReport:
    """Check every file's hash, each engine against golden tensors, and a picture.

    The picture needs the checkpoint and PyTorch; the package's own checkpoints are at hand. Raises
    `BundleError` for a broken bundle, `UsageError` for a checkpoint the bundle is not made from.
    """
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    task = progress.task("Hashing the bundle", total=total)
    bundle = open_bundle(path, check="all", on_bytes=task.advance)
    task.finish()
    recorded = [n for n, record in bundle.manifest.components.items() if record.golden]
    task = progress.task("Comparing components", total=len(recorded))
    components = []
    for name in recorded:
        components.append(_verify_component(bundle, name, runtime, options))
        task.advance()
    provenance = bundle.manifest.provenance.get("checkpoint")
    made_from = provenance if isinstance(provenance, dict) else {}
    origin = made_from.get("name")
    if checkpoint is None and isinstance(origin, str) and origin in DEMO_CHECKPOINTS:
        checkpoint = origin if _can_export() else None
    picture = None
    if checkpoint is not None:
        picture = _verify_picture(bundle, checkpoint, made_from, runtime, options, progress)
    return VerifyReport(bundle.content_hash, tuple(components), picture)


def _can_export() -> bool:
    """Whether PyTorch is here: a deployment machine verifies without it, by golden tensors."""
    return importlib.util.find_spec("torch") is not None


def _verify_component(
    bundle: Bundle, name: str, runtime: str, options: EngineOptions
) -> ComponentReport:
    record = bundle.manifest.components[name]
    assert record.golden is not None
    with open_engine(bundle, name, runtime, options) as engine:
        deviation = measure_component(engine, bundle.path(record.golden.path))
    return ComponentReport(name, record.precision, deviation, deviation.within(record.golden))


def _verify_picture(
    bundle: Bundle,
    name: str,
    made_from: dict[str, Any],
    runtime: str,
    options: EngineOptions,
    progress: Progress,
) -> PictureReport:
    checkpoint = open_source(name)
    from exporters.export import component_source
    from exporters.reference import ReferenceEngine

    def open_reference(component: str) -> Engine:
        return ReferenceEngine(*component_source(checkpoint, component, "fp32"))

    manifest = bundle.manifest
    if hash_checkpoint(checkpoint, progress).digest != made_from.get("sha256"):
        raise UsageError(
            f"{name} is not the checkpoint that {bundle.root} was made from: its weights or "
            "its layout differ."
        )
    tokenizers = load_tokenizers(bundle)
    engines = FluxPipeline.from_bundle(bundle.root, runtime, options)
    reference = FluxPipeline(bundle, tokenizers, open_reference)
    with engines, reference:
        ours = _picture(engines, "Drawing with the bundle", progress)
        theirs = _picture(reference, "Drawing with PyTorch", progress)
    # The host clips pictures to 0..1 and stops at NaN, so the peak is 1 and all is finite.
    mse = float(np.square(ours - theirs, dtype=np.float64).mean())
    return PictureReport(
        psnr=-10 * float(np.log10(mse)) if mse else float("inf"),
        max_difference=255 * float(np.abs(ours - theirs).max()),
        required_psnr=PICTURE_GATES[manifest.components["transformer"].precision],
    )


def _picture(pipe: FluxPipeline, words: str, progress: Progress) -> NDArray[np.float32]:
    task = progress.task(words, total=_STEPS + 1)
    result = pipe(
        _PROMPT,
        height=_SIDE,
        width=_SIDE,
        num_inference_steps=_STEPS,
        seed=_SEED,
        output_type="np",
        callback_on_step_end=lambda *_: task.advance(),
    )
    task.advance()
    images = result.images
    assert isinstance(images, np.ndarray)
    return images
