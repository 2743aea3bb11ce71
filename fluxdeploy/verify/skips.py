"""Finding the steps whose velocity can be extrapolated, by what it does to a bundle's pictures.

Which steps to leave out next is told from recorded trajectories, without a run of the transformer:
extrapolated velocities are sums of recorded ones, and so is what they change at the end. How many
can go is measured with pictures of search prompts, and held-out ones decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.files import read_whole, write_atomic
from fluxdeploy.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST, MAX_ORDER, SkipRecord
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.progress import Progress
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.latents import latent_shape, pack, token_grid
from fluxdeploy.sampling.noise import standard_normal
from fluxdeploy.sampling.skipping import Skips, extrapolation
from fluxdeploy.similarity import psnr

__all__ = ["Tuning", "find_skips", "skip_paths", "write_skips"]

_MARGIN = 0.5
"""Decibels that the search asks for beyond what is wanted: other prompts keep a little less."""

_HIGHEST = 150.0
"""Decibels of pictures that are equal; JSON has no infinity."""


@dataclass(frozen=True)
class Tuning:
    """What was found: `record` is None where no step can be left out.

    reached: dB, the least over the held-out pictures with one step left out, or what `record` has.
    evaluations: how often the transformer ran to find it.
    """

    record: SkipRecord | None
    reached: float
    evaluations: int


def skip_paths(
    velocities: Sequence[NDArray[np.float32]], sigmas: NDArray[np.float32], order: int
) -> list[tuple[int, ...]]:
    """Sets of steps to skip, each with one more than the one before, from none on.

    velocities: float32 [N, D] of each trajectory. The next step to go is the one after which the
    largest change at the end, of all trajectories, is the least.
    """
    grams = [v.astype(np.float64) @ v.astype(np.float64).T for v in velocities]
    steps = len(sigmas) - 1
    path: list[tuple[int, ...]] = [()]

    def change(skipped: tuple[int, ...]) -> float:
        weights = _changes(skipped, sigmas, order)
        return max(float(weights @ gram @ weights) for gram in grams)

    while len(path) < steps:
        last = path[-1]
        tries = [tuple(sorted((*last, s))) for s in range(1, steps) if s not in last]
        path.append(min(tries, key=change))
    return path


def _changes(
    skipped: Sequence[int], sigmas: NDArray[np.float32], order: int
) -> NDArray[np.float64]:
    """What each step's velocity, [N], weighs in the change of the latents at the end."""
    total = np.zeros(len(sigmas) - 1)
    known: list[int] = []
    for step in range(len(total)):
        if step not in skipped:
            known.append(step)
            continue
        used, length = known[-(order + 1) :], float(sigmas[step + 1] - sigmas[step])
        weights = extrapolation([float(sigmas[k]) for k in used], float(sigmas[step]))
        for k, weight in zip(used, weights, strict=True):
            total[k] += length * weight
        total[step] -= length
    return total


class _Pictures:
    """Pictures of some prompts, with and without skips, and how alike they are."""

    def __init__(
        self, pipe: FluxPipeline, prompts: Sequence[str], seed: int, options: dict[str, Any]
    ) -> None:
        self._pipe, self._prompts, self._seed, self._options = pipe, prompts, seed, options
        self.drawn = 0
        self._whole = [self._draw(number) for number in range(len(prompts))]

    def _draw(self, number: int, **more: Any) -> NDArray[np.float32]:
        self.drawn += 1
        options = {**self._options, "seed": self._seed + number, "output_type": "np", **more}
        picture: NDArray[np.float32] = np.asarray(
            self._pipe(self._prompts[number], **options).images
        )[0]
        return picture

    def least(self, skips: Skips, wanted: float) -> float:
        """dB of the picture that changes most; the first that falls short of `wanted` will do."""
        found = _HIGHEST
        for number, whole in enumerate(self._whole):
            found = min(found, psnr(self._draw(number, skip=skips), whole))
            if found < wanted:
                break
        return found


def find_skips(
    pipe: FluxPipeline,
    search: Sequence[str],
    held_out: Sequence[str],
    wanted: float,
    sampler: str,
    steps: int,
    height: int,
    width: int,
    progress: Progress,
) -> Tuning:
    """The most steps to skip such that every picture of `held_out` keeps `wanted` dB.

    A search over the number of steps, for each order of extrapolation.
    """
    options: dict[str, Any] = {"num_inference_steps": steps, "height": height, "width": width}
    trials = max(1, (steps - 1).bit_length())
    task = progress.task("Searching", total=len(search) + 2 + (MAX_ORDER + 1) * trials)
    velocities = []
    for number, prompt in enumerate(search):
        velocities.append(_record(pipe, prompt, number, options))
        task.advance()
    sigmas = _sigmas(pipe.bundle, steps, height, width)
    options["sampler"] = sampler
    seen = _Pictures(pipe, search, 0, options)
    task.advance()
    best, paths = (0, 0), {}
    for order in range(MAX_ORDER + 1):
        paths[order] = skip_paths(velocities, sigmas, order)
        count = _most(
            steps - 1,
            lambda k, order=order: (
                seen.least(  # type: ignore[misc]
                    Skips(paths[order][k], order), wanted + _MARGIN
                )
                >= wanted + _MARGIN
            ),
            task.advance,
        )
        best = max(best, (count, order))
    count, order = best
    unseen = _Pictures(pipe, held_out, len(search), options)
    count, reached = max(count, 1), 0.0
    while count >= 1 and steps > 1:
        reached = unseen.least(Skips(paths[order][count], order), wanted)
        if reached >= wanted:
            break
        count -= 1
    task.finish()
    runs = (seen.drawn + unseen.drawn + len(search)) * steps
    if count < 1 or steps < 2:
        return Tuning(None, reached, runs)
    record = SkipRecord(
        sampler, steps, paths[order][count], order, height, width, wanted, reached, len(held_out)
    )
    return Tuning(record, reached, runs)


def _most(most: int, holds: Callable[[int], bool], tried: Callable[[], None]) -> int:
    """The largest count up to `most` that holds, where all below one that holds do too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
        tried()
    return low


def _sigmas(bundle: Bundle, steps: int, height: int, width: int) -> NDArray[np.float32]:
    rows, columns = token_grid(height, width, bundle.manifest.latents)
    return schedule.sigmas(bundle.manifest.schedule, steps, rows * columns)


def _record(
    pipe: FluxPipeline, prompt: str, seed: int, options: dict[str, Any]
) -> NDArray[np.float32]:
    """The velocities of a trajectory of Euler's, float32 [N, D]."""
    spec = pipe.bundle.manifest.latents
    height, width, steps = (options[n] for n in ("height", "width", "num_inference_steps"))
    options = {**options, "sampler": "euler"}
    noise = pack(standard_normal(latent_shape(1, height, width, spec), seed), spec)
    places = [noise.reshape(-1)]

    def keep(pipe: FluxPipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        places.append(state["latents"].reshape(-1).copy())

    pipe(prompt, latents=noise, callback_on_step_end=keep, output_type="np", **options)
    lengths = np.diff(_sigmas(pipe.bundle, steps, height, width))
    velocities: NDArray[np.float32] = np.diff(np.stack(places), axis=0) / lengths[:, None]
    return velocities


def write_skips(bundle: Bundle, record: SkipRecord) -> None:
    """Put a record into the manifest of an edition, in place of one for the same calls.

    The file is replaced at once, or left as it was. Raises `BundleError` where another bundle has
    taken the place of this one, or where the file cannot be written.
    """
    key = (record.sampler, record.num_inference_steps)
    others = [r for r in bundle.manifest.skips if (r.sampler, r.num_inference_steps) != key]
    skips = sorted((*others, record), key=lambda r: (r.sampler, r.num_inference_steps))
    path = bundle.root / MANIFEST_NAME
    with bundle.unchanged([]):
        whole = from_json(read_whole(path, MAX_MANIFEST).decode("utf-8"), str(path))
    tuned = replace(bundle.manifest, skips=tuple(skips))
    editions = [tuned if e.runtime == tuned.runtime else e for e in whole.each()]
    text = to_json(whole.with_each(editions))
    from_json(text, str(path))
    with bundle.unchanged([]):
        pass
    write_atomic(path, text)
