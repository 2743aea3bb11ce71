"""A bundle's pictures and layers held against PyTorch float32, with the manifest's thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines import Engine, EngineOptions
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import QualityRecord
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.precision import PRECISIONS
from fluxdeploy.progress import Progress
from fluxdeploy.text import load_tokenizers
from fluxdeploy.verify.similarity import psnr, ssim

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from fluxdeploy.demo.scenes import Scene

__all__ = [
    "OBJECTS_PICTURES",
    "LayersReport",
    "PictureReport",
    "PicturesReport",
    "Plan",
    "compare_layers",
    "compare_pictures",
    "draw",
    "judge",
    "objects_kept",
    "plan_pictures",
    "plan_scenes",
]

OBJECTS_PICTURES = 20
"""How many pictures it takes to compare objects: of fewer, one more or less would decide."""

_OBJECTS_LOST = 0.1
"""The largest share of pictures that may lose their objects."""

_STEPS = 4
_SIDE = 256
"""Pictures of checkpoints that are not the package's own: small enough for float32 on a CPU, large
enough to show a mistake."""

_PROMPTS = (
    "a red circle above a blue square",
    "portrait of an old sailor with a white beard, harbour at dusk, photograph",
    'a shop window with a sign that says "FRESH BREAD"',
    "a fox asleep in deep snow under a pine tree, watercolour",
    "aerial view of a coast where turquoise water meets black sand",
    "two wooden chairs beside a round table in a sunlit kitchen",
    "a crowded night market in the rain, neon lights, reflections on wet stones",
    "a brass clockwork owl on a stack of old books, studio light, plain background",
)

_LAYER_PROMPTS = 2
"""A layer's noise hardly depends on the prompt: these few, in one size, show a wrong scale."""


@dataclass(frozen=True)
class PictureReport:
    """A picture of the bundle against the same prompt and seed in PyTorch.

    psnr: dB. max_difference: of 255. right, right_in_pytorch: whether the picture's objects are
    those of the prompt; None where the prompt is not one of the demo checkpoints' scenes.
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    max_difference: float
    right: bool | None
    right_in_pytorch: bool | None


@dataclass(frozen=True)
class PicturesReport:
    """All pictures that were compared, of `height` x `width` pixels, and their gate."""

    height: int
    width: int
    steps: int
    gate: QualityRecord
    pictures: tuple[PictureReport, ...]

    @property
    def psnr(self) -> float:
        """The median, in dB."""
        return statistics.median(picture.psnr for picture in self.pictures)

    @property
    def ssim(self) -> float:
        """The median."""
        return statistics.median(picture.ssim for picture in self.pictures)

    @property
    def objects(self) -> tuple[float, float] | None:
        """The shares of pictures whose objects are right: the bundle's and PyTorch's."""
        right = _known(picture.right for picture in self.pictures)
        expected = _known(picture.right_in_pytorch for picture in self.pictures)
        return (statistics.fmean(right), statistics.fmean(expected)) if right else None

    @property
    def objects_passed(self) -> bool:
        """Whether no more pictures than allowed are wrong in the bundle alone."""
        objects = self.objects
        return objects is None or objects_kept(*objects, len(self.pictures))

    @property
    def psnr_passed(self) -> bool:
        """Whether the median is within the gate."""
        return self.psnr >= self.gate.min_psnr

    @property
    def ssim_passed(self) -> bool:
        """Whether the median is within the gate."""
        return self.ssim >= self.gate.min_ssim

    @property
    def passed(self) -> bool:
        """Whether the medians and the objects are within the gate."""
        return self.psnr_passed and self.ssim_passed and self.objects_passed

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        objects = self.objects
        return {
            "count": len(self.pictures),
            "height": self.height,
            "width": self.width,
            "steps": self.steps,
            "psnr": _spread([picture.psnr for picture in self.pictures]),
            "ssim": _spread([picture.ssim for picture in self.pictures]),
            "max_difference": max(picture.max_difference for picture in self.pictures),
            "objects": None if objects is None else {"bundle": objects[0], "pytorch": objects[1]},
            "min_psnr": self.gate.min_psnr,
            "min_ssim": self.gate.min_ssim,
            "passed": self.passed,
            "pictures": [asdict(picture) for picture in self.pictures],
        }


def objects_kept(share: float, reference: float, pictures: int) -> bool:
    """Whether a bundle draws the right objects about as often as PyTorch does."""
    lost = reference - share
    # The shares are multiples of 1 / pictures, which floats round.
    return pictures < OBJECTS_PICTURES or lost <= _OBJECTS_LOST + 0.01 / pictures


@dataclass(frozen=True)
class LayersReport:
    """Signal-to-quantization-noise ratios, in dB, of the transformer's quantized layers.

    These are its linears and, where attention is quantized, Q, K, V and the output of each block's,
    in the network's order. `min_sqnr` None is no gate.
    """

    sqnr: Mapping[str, float]
    min_sqnr: float | None

    @property
    def passed(self) -> bool:
        """Whether every layer is within the gate."""
        return self.min_sqnr is None or min(self.sqnr.values()) >= self.min_sqnr

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The layers with the most noise, worst first."""
        return sorted(self.sqnr.items(), key=lambda layer: layer[1])[:count]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "worst": self.worst(1)[0][0],
            "min_sqnr": self.min_sqnr,
            "passed": self.passed,
            "sqnr": dict(self.sqnr),
        }


def compare_layers(
    bundle: Bundle, checkpoint: Checkpoint, progress: Progress
) -> LayersReport | None:
    """The layers' noise, of weights and scales in the bundle; None where nothing is quantized."""
    record = bundle.manifest.components["transformer"]
    if PRECISIONS[record.precision].quantization is None:
        return None
    from exporters.calibrate.trajectory import default_calibration
    from exporters.check.fidelity import measure_fidelity

    usual = default_calibration(checkpoint)
    few = replace(usual, prompts=usual.prompts[:_LAYER_PROMPTS], sizes=usual.sizes[:1])
    (graph,) = (file.path for file in record.files if file.path.endswith(".onnx"))
    sqnr = measure_fidelity(checkpoint, bundle.path(graph), few, progress)
    return LayersReport(sqnr, bundle.manifest.quality.min_sqnr)


@dataclass(frozen=True)
class Plan:
    """What is drawn; picture number i has seed i. `scenes` is empty where no scorer knows them."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    height: int
    width: int
    steps: int


def plan_scenes(bundle: Bundle, count: int) -> Plan:
    """Scenes that the demo checkpoints were not trained on, in the size that they draw best."""
    from fluxdeploy.demo.survey import ask

    questions = ask(count)
    defaults = bundle.manifest.defaults
    return Plan(
        tuple(question.prompt for question in questions),
        tuple(question.scene for question in questions),
        defaults.height,
        defaults.width,
        defaults.num_inference_steps,
    )


def plan_pictures(bundle: Bundle, count: int) -> Plan:
    """Prompts of all kinds, in a few steps, as near to `_SIDE` pixels as the engines allow."""
    limits = bundle.manifest.components["vae_decoder"].engines[0].dimensions
    height, width = (min(max(_SIDE, limits[s].min), limits[s].max) for s in ("H", "W"))
    prompts = tuple(_PROMPTS[number % len(_PROMPTS)] for number in range(count))
    return Plan(prompts, (), height, width, _STEPS)


def compare_pictures(
    bundle: Bundle,
    checkpoint: Checkpoint,
    plan: Plan,
    runtime: str,
    options: EngineOptions,
    progress: Progress,
) -> PicturesReport:
    """Draw what is planned with the bundle and with PyTorch, and compare."""
    from fluxdeploy.verify.reference import ReferenceEngine

    def open_reference(component: str) -> Engine:
        return ReferenceEngine(checkpoint, component)

    # One after the other: both together may not fit into memory.
    with FluxPipeline.from_bundle(bundle.root, runtime, options) as pipe:
        drawn = draw(pipe, plan, "Drawing with the bundle", progress)
    with FluxPipeline(bundle, load_tokenizers(bundle), open_reference) as pipe:
        expected = draw(pipe, plan, "Drawing with PyTorch", progress)
    right, right_in_pytorch = judge(drawn, plan.scenes), judge(expected, plan.scenes)
    pictures = tuple(
        PictureReport(
            prompt=prompt,
            seed=seed,
            psnr=psnr(drawn[seed], expected[seed]),
            ssim=ssim(drawn[seed], expected[seed]),
            max_difference=255 * float(np.abs(drawn[seed] - expected[seed]).max()),
            right=right[seed],
            right_in_pytorch=right_in_pytorch[seed],
        )
        for seed, prompt in enumerate(plan.prompts)
    )
    gate = bundle.manifest.quality
    return PicturesReport(plan.height, plan.width, plan.steps, gate, pictures)


def draw(
    pipe: FluxPipeline, plan: Plan, words: str, progress: Progress
) -> list[NDArray[np.float32]]:
    """The planned pictures, float32 [H, W, 3] in 0..1: the host clips them, and stops at NaN."""
    task = progress.task(words, total=len(plan.prompts) * (plan.steps + 1))
    pictures = []
    for seed, prompt in enumerate(plan.prompts):
        images = pipe(
            prompt,
            height=plan.height,
            width=plan.width,
            num_inference_steps=plan.steps,
            seed=seed,
            output_type="np",
            callback_on_step_end=lambda *_: task.advance(),
        ).images
        task.advance()
        assert isinstance(images, np.ndarray)
        pictures.append(images[0])
    return pictures


def judge(pictures: Sequence[NDArray[np.float32]], scenes: Sequence[Scene]) -> list[bool | None]:
    """Whether each picture shows the objects of its scene; None where there are no scenes."""
    if not scenes:
        return [None] * len(pictures)
    from fluxdeploy.demo.scorer import score

    shown = [np.rint(255 * picture).astype(np.uint8) for picture in pictures]
    return [score(picture, scene).objects for picture, scene in zip(shown, scenes, strict=True)]


def _known(values: Iterable[bool | None]) -> list[bool]:
    return [value for value in values if value is not None]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
