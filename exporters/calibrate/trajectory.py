"""Pictures in the making: what a float32 transformer is fed on its way from noise to picture.

Euler's steps, for a few prompts and sizes at once. Every stage of a step runs for all samples
before the next one is read, so that memory holds the weights of a single block and a step reads
the checkpoint once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.calibrate.task_inputs import TaskInputs, task_inputs
from exporters.checkpoint import Checkpoint, Weights
from exporters.components.chain import Chain, Stage
from exporters.components.mmdit import seen_specs
from exporters.components.registry import COMPONENTS
from exporters.components.residuals import KINDS, residual_count
from exporters.components.run import run_samples
from exporters.tokenizers import open_tokenizer
from fluxdeploy.bundle.manifest import LatentSpec
from fluxdeploy.errors import NumericError, UsageError
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.latents import check_size, latent_shape, pack, token_grid
from fluxdeploy.sampling.noise import check_seed, standard_normal
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.schedule import sigmas

__all__ = [
    "Calibration",
    "Runner",
    "Sample",
    "default_calibration",
    "finite",
    "start_samples",
    "take_step",
]

Array = NDArray[np.generic]
Floats = NDArray[np.float32]

_LONGEST_SIDE = 512
"""Pixels. A token's activations hardly depend on how many others there are, but the work does: a
step of the full-size model takes 24 GFLOP a token, hours on a CPU at 1024x1024."""

# The first four are what a full-size model is measured over: no text, a long text that fills the
# picture with detail, letters, and extremes of light.
_FEW = 4
_PROMPTS = (
    "",
    "An elderly fisherman with a grey beard and a yellow raincoat mends a torn net on a wooden "
    "pier; behind him, out of focus, lie three rusty boats, gulls circle over the harbour, and "
    "low evening sun makes every rope, wrinkle and wet plank stand out in sharp detail.",
    'A neon sign that says "OPEN ALL NIGHT" over a narrow street in the rain, seen at midnight',
    "Bright noon light on snowy mountains above a turquoise lake, wide landscape photograph",
    "Portrait of a laughing woman with curly hair, studio light, plain background",
    "A pencil drawing of a sleeping cat",
    "A small red circle above a large blue square on a white background",
    "A black background",
    "Children fly kites on a crowded beach in summer while a storm gathers far out at sea, "
    "painted in thick strokes of oil",
)


@dataclass(frozen=True)
class Calibration:
    """What is measured over: every prompt at every size, from noise to picture.

    `sizes` are (height, width) in pixels. `guidance` counts for guidance-distilled models only.
    """

    prompts: tuple[str, ...]
    seed: int
    sizes: tuple[tuple[int, int], ...]
    steps: int
    guidance: float


def default_calibration(checkpoint: Checkpoint) -> Calibration:
    """Prompts of all kinds, at the checkpoint's own size and in two other proportions.

    A checkpoint for pictures larger than 512x512 is measured at 512x512 and over fewer prompts.
    """
    defaults = checkpoint.defaults
    side = checkpoint.token_pixels
    height, width = (min(pixels, _LONGEST_SIDE) for pixels in (defaults.height, defaults.width))

    def whole_tokens(pixels: int) -> int:
        return max(side, pixels // side * side)

    sizes = (
        (height, width),
        (whole_tokens(height * 3 // 4), width),
        (height, whole_tokens(width // 2)),
    )
    small = (height, width) == (defaults.height, defaults.width)
    return Calibration(
        prompts=_PROMPTS if small else _PROMPTS[:_FEW],
        seed=0,
        sizes=tuple(dict.fromkeys(sizes)),
        steps=4,
        guidance=float(defaults.guidance_scale),
    )


@dataclass
class Sample:
    """One prompt at one size, on its way from noise to picture.

    latents: float32 [1, L, C], packed. sigmas: [N + 1]. modulation: [N, 1, M, D].
    constant: the transformer's inputs that no step changes.
    given: what stands around the latents.
    """

    latents: Floats
    sigmas: Floats
    modulation: Array
    constant: Mapping[str, Array]
    given: TaskInputs

    def inputs(self, step: int) -> dict[str, Array]:
        """What the transformer takes at a step."""
        states = self.given.around(self.latents)
        return {**self.constant, "hidden_states": states, "modulation": self.modulation[step]}

    def advance(self, step: int, velocity: Array) -> None:
        """Euler's step along the flow, as `fluxdeploy.host.loop` takes it."""
        length = self.latents.shape[1]
        change = (self.sigmas[step + 1] - self.sigmas[step]) * velocity[:, :length]
        self.latents = self.latents + change


Runner = Callable[[str, Sequence[Mapping[str, Array]]], list[dict[str, Array]]]
"""Runs a component, by its name, for several samples, as `run_samples` does."""


def start_samples(
    checkpoint: Checkpoint,
    calibration: Calibration,
    progress: Progress,
    run: Runner | None = None,
) -> list[Sample]:
    """Every prompt at every size, at its start. `run` is float32 PyTorch unless it is given.

    Raises `UsageError` for a calibration that no picture can be made with, and `CheckpointError`
    for missing tensors.
    """
    latents = checkpoint.latents
    _check(calibration, latents)
    grids = [token_grid(height, width, latents) for height, width in calibration.sizes]
    # The levels depend on the size. One run of the conditioner serves the schedules of all.
    schedules = [
        sigmas(checkpoint.schedule, calibration.steps, rows * columns) for rows, columns in grids
    ]
    timesteps = np.concatenate([levels[:-1] for levels in schedules])
    run = run or _reference(checkpoint, progress)
    conditions = _encode(checkpoint, calibration, timesteps, run)
    text_tokens, axes = checkpoint.defaults.max_sequence_length, len(checkpoint.rope.axes_dims)
    samples = []
    for number, (size, grid, levels) in enumerate(
        zip(calibration.sizes, grids, schedules, strict=True)
    ):
        shape = latent_shape(len(calibration.prompts), *size, latents)
        noise = pack(standard_normal(shape, calibration.seed), latents)
        given = task_inputs(checkpoint, *size)
        ids = np.concatenate([joint_ids(text_tokens, *grid, axes), *given.ids])
        cos, sin = rope_tables(ids, checkpoint.rope)
        steps = slice(number * calibration.steps, (number + 1) * calibration.steps)
        for start, condition in zip(noise, conditions, strict=True):
            constant = {
                "context": condition["context"],
                "rope_cos": cos,
                "rope_sin": sin,
                **_no_residuals(checkpoint, grid),
                **_nothing_seen(checkpoint),
            }
            modulation = condition["modulation"][steps]
            samples.append(Sample(start[None], levels, modulation, constant, given))
    return samples


def _no_residuals(checkpoint: Checkpoint, grid: tuple[int, int]) -> dict[str, Array]:
    """What the transformer is given where none of its ControlNets runs."""
    tokens, width = math.prod(grid), checkpoint.transformer.width
    counts = {kind: residual_count(checkpoint.controlnets, kind) for kind in KINDS}
    return {
        f"{kind}_residuals": np.zeros((count, 1, tokens, width), np.float32)
        for kind, count in counts.items()
        if count
    }


def _nothing_seen(checkpoint: Checkpoint) -> dict[str, Array]:
    """What the transformer is given where its IP-Adapter is given no picture."""
    if checkpoint.ip_adapter is None:
        return {}
    return {
        spec.name: np.zeros([1 if isinstance(d, str) else d for d in spec.shape], np.float32)
        for spec in seen_specs(checkpoint.transformer)
    }


def _reference(checkpoint: Checkpoint, progress: Progress) -> Runner:
    sources = {
        name: COMPONENTS[name].source(checkpoint, "fp32") for name in ("clip", "t5", "conditioner")
    }
    stages = sum(len(chain.stages) for chain, _ in sources.values())
    task = progress.task("Encoding the prompts", total=stages)

    def run(name: str, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        return run_samples(*sources[name], samples, after=task.advance)

    return run


def _encode(
    checkpoint: Checkpoint, calibration: Calibration, timesteps: Floats, run: Runner
) -> list[dict[str, Array]]:
    """For each prompt its `context` [1, S, D] and `modulation` [N, 1, M, D] at all timesteps."""
    length = checkpoint.defaults.max_sequence_length
    clip_ids = open_tokenizer(checkpoint.tokenizer("clip"), "clip").encode(calibration.prompts)
    t5_ids = open_tokenizer(checkpoint.tokenizer("t5"), "t5", length).encode(calibration.prompts)
    pooled = run("clip", [{"input_ids": ids[None]} for ids in clip_ids])
    text = run("t5", [{"input_ids": ids[None]} for ids in t5_ids])
    schedule: dict[str, Array] = {"timestep": timesteps}
    if checkpoint.transformer.guidance_embedding:
        schedule["guidance"] = np.full(1, calibration.guidance, np.float32)
    return run("conditioner", [{**p, **t, **schedule} for p, t in zip(pooled, text, strict=True)])


def take_step(
    chain: Chain,
    weights: Weights,
    samples: Sequence[Sample],
    step: int,
    before: Callable[[Stage], None] = lambda stage: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run the transformer for all samples and move their latents on to the next step.

    `before` and `after` are `run_samples`'. Raises `NumericError` for a velocity that is not
    finite.
    """
    inputs = [sample.inputs(step) for sample in samples]
    outputs = run_samples(chain, weights, inputs, before, after)
    for sample, output in zip(samples, outputs, strict=True):
        velocity = output["velocity"]
        finite(float(np.abs(velocity).max()), "The velocity holds")
        sample.advance(step, velocity)


def _check(calibration: Calibration, latents: LatentSpec) -> None:
    if not calibration.prompts or not calibration.sizes:
        raise UsageError("A calibration needs at least one prompt and one size.")
    for height, width in calibration.sizes:
        check_size(height, width, latents)
    check_seed(calibration.seed)


def finite(magnitude: float, what: str) -> float:
    """The magnitude; raises `NumericError` where it is none. `what` begins the message."""
    if not math.isfinite(magnitude):
        raise NumericError(
            f"{what} NaN or infinity in float32, so nothing can be quantized. The checkpoint is "
            "damaged, or trained past float32's range: fetch its files again."
        )
    return magnitude
