"""A bundle's pictures held against PyTorch float32, with the manifest's thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines import Engine, EngineOptions, open_engine
from fluxdeploy.bench.stopwatch import Stopwatch
from fluxdeploy.bench.timed_engine import TimedEngine
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.manifest import QualityRecord
from fluxdeploy.host.examples import example_arguments
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from fluxdeploy.similarity import psnr, ssim
from fluxdeploy.text import load_tokenizers

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from fluxdeploy.demo.scenes import Scene

__all__ = [
    "OBJECTS_PICTURES",
    "Drawing",
    "PictureReport",
    "PicturesReport",
    "choose_prompts",
    "choose_scenes",
    "compare_pictures",
    "draw",
    "judge",
    "objects_kept",
]

Pixels = NDArray[np.float32]

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
    """All pictures that were compared, of `height` x `width` pixels, and their gate.

    seconds: of each component, a picture. drawn, expected: the bundle's pictures and PyTorch's,
    float32 [H, W, 3] in 0..1.
    """

    height: int
    width: int
    steps: int
    gate: QualityRecord
    pictures: tuple[PictureReport, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    drawn: tuple[Pixels, ...] = field(default=(), repr=False, compare=False)
    expected: tuple[Pixels, ...] = field(default=(), repr=False, compare=False)

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
            "seconds": dict(self.seconds),
            "pictures": [asdict(picture) for picture in self.pictures],
        }


def objects_kept(share: float, reference: float, pictures: int) -> bool:
    """Whether a bundle draws the right objects about as often as PyTorch does."""
    lost = reference - share
    # The shares are multiples of 1 / pictures, which floats round.
    return pictures < OBJECTS_PICTURES or lost <= _OBJECTS_LOST + 0.01 / pictures


@dataclass(frozen=True)
class Drawing:
    """What is drawn; picture number i has seed i. `scenes` is empty where no scorer knows them."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    height: int
    width: int
    steps: int


def choose_scenes(bundle: Bundle, count: int) -> Drawing:
    """Scenes that the demo checkpoints were not trained on, in the size that they draw best."""
    from fluxdeploy.demo.survey import ask

    questions = ask(count)
    defaults = bundle.manifest.defaults
    return Drawing(
        tuple(question.prompt for question in questions),
        tuple(question.scene for question in questions),
        defaults.height,
        defaults.width,
        defaults.num_inference_steps,
    )


def choose_prompts(bundle: Bundle, count: int, given: Sequence[str] = _PROMPTS) -> Drawing:
    """Prompts that are given, or some of all kinds, in a few steps.

    Their size is as near to `_SIDE` pixels as the engines allow.
    """
    limits = bundle.manifest.components["vae_decoder"].engines[0].dimensions
    height, width = (min(max(_SIDE, limits[s].min), limits[s].max) for s in ("H", "W"))
    prompts = tuple(given[number % len(given)] for number in range(count))
    return Drawing(prompts, (), height, width, _STEPS)


def compare_pictures(
    bundle: Bundle,
    checkpoint: Checkpoint,
    drawing: Drawing,
    runtime: str,
    options: EngineOptions,
    progress: Progress,
) -> PicturesReport:
    """Draw the same with the bundle and with PyTorch, and compare."""
    from fluxdeploy.verify.reference import ReferenceEngine

    def open_reference(component: str) -> Engine:
        return ReferenceEngine(checkpoint, component)

    # One after the other: both together may not fit into memory.
    watch = Stopwatch()

    def open_component(component: str) -> Engine:
        return TimedEngine(open_engine(bundle, component, runtime, options), watch)

    with FluxPipeline(bundle, load_tokenizers(bundle), open_component) as pipe:
        drawn = draw(pipe, drawing, "Drawing with the bundle", progress)
    with FluxPipeline(bundle, load_tokenizers(bundle), open_reference) as pipe:
        expected = draw(pipe, drawing, "Drawing with PyTorch", progress)
    right, right_in_pytorch = judge(drawn, drawing.scenes), judge(expected, drawing.scenes)
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
        for seed, prompt in enumerate(drawing.prompts)
    )
    return PicturesReport(
        drawing.height,
        drawing.width,
        drawing.steps,
        bundle.manifest.quality,
        pictures,
        {name: taken / len(pictures) for name, taken in watch.totals().items()},
        tuple(drawn),
        tuple(expected),
    )


def draw(
    pipe: FluxPipeline, drawing: Drawing, words: str, progress: Progress
) -> list[NDArray[np.float32]]:
    """The pictures, float32 [H, W, 3] in 0..1: the host clips them, and stops at NaN."""
    task = progress.task(words, total=len(drawing.prompts) * (drawing.steps + 1))
    given = example_arguments(pipe.bundle.manifest, drawing.height, drawing.width)
    pictures = []
    for seed, prompt in enumerate(drawing.prompts):
        images = pipe(
            prompt,
            height=drawing.height,
            width=drawing.width,
            num_inference_steps=drawing.steps,
            seed=seed,
            output_type="np",
            callback_on_step_end=lambda *_: task.advance(),
            **given,
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
