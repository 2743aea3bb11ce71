"""Verifying: a bundle's files and engines, and its pictures and layers against PyTorch float32."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines import EngineOptions, choose_edition, open_engine
from engines.golden import Deviation, measure_component
from fluxdeploy.build.checkpoint import checkpoint_record, open_recorded
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.files import sha256_file
from fluxdeploy.demo import DEMO_CHECKPOINTS, DEMO_LORAS
from fluxdeploy.errors import UsageError
from fluxdeploy.install import install_command
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from fluxdeploy.verify.layers import LayersReport, compare_layers
from fluxdeploy.verify.pictures import (
    PicturesReport,
    choose_prompts,
    choose_scenes,
    compare_pictures,
)

__all__ = ["ComponentReport", "VerifyReport", "verify"]


@dataclass(frozen=True)
class ComponentReport:
    """A component's engine against its golden tensors; see `Engine.emulated`.

    size: bytes of all its files, of which other components may share some.
    """

    name: str
    precision: str
    emulated: bool
    deviation: Deviation
    passed: bool
    size: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """All that was compared.

    `pictures` is None where no checkpoint was at hand, `layers` is None there and where the
    transformer is not quantized.
    """

    bundle_hash: str
    components: tuple[ComponentReport, ...]
    pictures: PicturesReport | None
    layers: LayersReport | None

    @property
    def emulated(self) -> tuple[str, ...]:
        """The components that have the numbers of their precision here, but not its speed."""
        return tuple(report.name for report in self.components if report.emulated)

    @property
    def passed(self) -> bool:
        """Whether everything is within its gate."""
        reports = (*self.components, self.pictures, self.layers)
        return all(report is None or report.passed for report in reports)

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values; an infinite ratio, of no noise at all, is null."""
        report = {
            "bundle_hash": self.bundle_hash,
            "passed": self.passed,
            "emulated": bool(self.emulated),
            "components": [asdict(component) for component in self.components],
            "pictures": None if self.pictures is None else self.pictures.as_json(),
            "layers": None if self.layers is None else self.layers.as_json(),
        }
        plain = _finite(report)
        assert isinstance(plain, dict)
        return plain


def verify(
    path: Path,
    checkpoint: str | None,
    runtime: str,
    options: EngineOptions,
    progress: Progress,
    pictures: int | None = None,
    prompts: tuple[str, ...] = (),
    loras: tuple[LoraFile, ...] = (),
    base: Path | None = None,
    edition: str | None = None,
) -> VerifyReport:
    """Check every file's hash, each engine against golden tensors, and pictures and layers.

    `pictures` are drawn with the bundle and with PyTorch, which takes the checkpoint; the package's
    own are at hand. None is one picture where that can be had, and none elsewhere, or one for each
    of `prompts`, which are drawn in place of the usual ones. Layers are compared along with them
    where the transformer is quantized. Of a bundle's editions it looks at that of the runtime
    `edition`, and at the one that `runtime` takes where that is None.

    Raises `BundleError` for a broken bundle, `UsageError` for a checkpoint that the bundle is not
    made from, for other `loras` than were merged into it, and for `pictures` or
    `prompts` without a checkpoint.
    """
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    task = progress.task("Hashing the bundle", total=total)
    bundle = open_bundle(path, check="all", on_bytes=task.advance)
    task.finish()
    bundle = choose_edition(bundle, edition or runtime)
    if pictures is None and prompts:
        pictures = len(prompts)
    # The package has its checkpoints and LoRAs at hand, and no others.
    needed = pictures is not None or bool(loras)
    loras = loras or _find_loras(bundle)
    at_hand = loras or not bundle.manifest.provenance.get("loras")
    source = _find_checkpoint(bundle, checkpoint, needed) if at_hand or needed else checkpoint
    opened = None if source is None else open_recorded(bundle, source, progress, loras, base)
    recorded = [n for n, record in bundle.manifest.components.items() if record.golden]
    task = progress.task("Comparing components", total=len(recorded))
    components = []
    for name in recorded:
        components.append(_verify_component(bundle, name, runtime, options))
        task.advance()
    if opened is None:
        return VerifyReport(bundle.content_hash, tuple(components), None, None)
    layers = compare_layers(bundle, opened, progress)
    count = 1 if pictures is None else pictures
    # Its scenes are for text alone: others have a picture given beside it.
    is_demo = opened.task == "text to image" and (
        source in DEMO_CHECKPOINTS or checkpoint_record(bundle).get("name") in DEMO_CHECKPOINTS
    )
    if prompts:
        drawing = choose_prompts(bundle, count, prompts)
    else:
        drawing = choose_scenes(bundle, count) if is_demo else choose_prompts(bundle, count)
    compared = compare_pictures(bundle, opened, drawing, runtime, options, progress)
    return VerifyReport(bundle.content_hash, tuple(components), compared, layers)


def _find_loras(bundle: Bundle) -> tuple[LoraFile, ...]:
    """The LoRAs that were merged into a bundle, where all of them come with the package."""
    recorded = bundle.manifest.provenance.get("loras")
    if not isinstance(recorded, list) or not recorded:
        return ()
    known = {sha256_file(path): path for path in DEMO_LORAS.values()}
    found = []
    for record in recorded:
        match record:
            case {"sha256": str(digest), "scale": float(scale)} if digest in known:
                found.append(LoraFile(known[digest], scale))
            case _:
                return ()
    return tuple(found)


def _find_checkpoint(bundle: Bundle, given: str | None, needed: bool) -> str | None:
    """What pictures are compared with, or None where a deployment machine has only the bundle."""
    if given is not None:
        return given
    name = checkpoint_record(bundle).get("name")
    # Without PyTorch a bundle is verified by its golden tensors.
    has_torch = importlib.util.find_spec("torch") is not None
    if isinstance(name, str) and name in DEMO_CHECKPOINTS and has_torch:
        return name
    if needed:
        raise UsageError(
            "Pictures are compared with PyTorch's, which takes --checkpoint, what the bundle was "
            f"made from, and PyTorch: {install_command('export')}."
        )
    return None


def _verify_component(
    bundle: Bundle, name: str, runtime: str, options: EngineOptions
) -> ComponentReport:
    record = bundle.manifest.components[name]
    assert record.golden is not None
    with open_engine(bundle, name, runtime, options) as engine, bundle.unchanged(record.files):
        deviation = measure_component(engine, bundle.path(record.golden.path))
    passed = deviation.within(record.golden)
    size = sum(file.size for file in record.files)
    return ComponentReport(name, record.precision, engine.emulated, deviation, passed, size)


def _finite(value: Any) -> Any:
    """JSON values with null in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
