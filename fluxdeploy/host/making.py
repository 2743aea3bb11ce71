"""The way of one call: task, prompts, steps, pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Engine
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.components import Components, Run
from fluxdeploy.host.decoding import decode
from fluxdeploy.host.loop import StepCallback, denoise
from fluxdeploy.host.loras import SideInputs
from fluxdeploy.host.previews import Previews, Wanted, linear_pictures
from fluxdeploy.host.prompts import Condition, PromptEncoder, condition, with_text
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.host.tiles import tiled
from fluxdeploy.host.turns import Turn
from fluxdeploy.host.velocity import HiddenStates, ModulatedTransformer
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.latents import token_grid
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.sampler import load_sampler

__all__ = ["LevelCallback", "make_pictures"]

LevelCallback = Callable[[int, np.float32, NDArray[np.float32]], "NDArray[np.float32] | None"]
"""Called after each step with its index, the noise level it began at, and the live latents; may
return others to go on with."""


def make_pictures(
    task: Task,
    components: Components,
    encoder: PromptEncoder,
    loras: SideInputs,
    callback: LevelCallback | None,
    previews: Wanted | None,
    turn: Turn,
    interrupted: Callable[[], bool],
    tell: Callable[[str], None],
    latents_only: bool = False,
) -> NDArray[np.float32]:
    """Pictures, float32 [B, H, W, 3] in 0..1, or their latents [B, L, C], packed.

    previews: what to show on the way, and to whom. interrupted: whether to make no step more.
    tell: called with a sentence on each part of the VAE that runs in tiles.

    Raises `UsageError` for sizes that an engine does not take, `NumericError` for what is not
    finite, and `Cancelled`.
    """
    manifest, request = task.manifest, task.request
    run = tiled(functools.partial(components.run, turn), manifest, tell)
    sampler = load_sampler(request.sampler)
    rows, columns = token_grid(request.height, request.width, manifest.latents)
    unshifted = request.num_inference_steps if request.sigmas is None else request.sigmas
    sigmas = schedule.sigmas(manifest.schedule, unshifted, rows * columns)
    levels = sampler.levels(sigmas[-(task.steps + 1) :])
    sizes = _engine_sizes(task, len(levels), loras)
    if latents_only:
        del sizes["vae_decoder"]
    components.check_sizes(turn, sizes)

    start = task.prepare(sigmas, run)
    components.release(*task.components)
    beside = _with_loras(run, components, loras)
    conditions = _conditions(task, encoder, start, sampler.levels(start.sigmas), beside)
    components.release("clip", "t5", "conditioner")

    # Before the largest component is opened.
    turn.check("before the first step")

    def decoded(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if latents_only:
            return latents
        with turn.stage("decoding"):
            return decode(latents, request.height, request.width, manifest.latents, run, turn)

    def previewed(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if previews is None or previews.linear is None or latents_only:
            return decoded(latents)
        size = request.height, request.width
        return linear_pictures(latents, *size, manifest.latents, previews.linear)

    with turn.stage("denoising"):
        transformer = components.engine("transformer")
        velocity, *negative = _velocities(
            transformer,
            conditions,
            start,
            rows,
            columns,
            manifest,
            loras.of(transformer),
            turn,
        )
        denoise(
            sampler,
            start.latents,
            start.sigmas,
            velocity,
            negative=negative[0] if negative else None,
            true_cfg_scale=request.true_cfg_scale,
            skips=task.skips,
            blend=functools.partial(_step_made, turn, start),
            on_step_end=_after_step(callback, previews, start, previewed),
            cancel=turn,
            interrupted=interrupted,
        )
    components.release("transformer")
    pictures = decoded(start.latents)
    components.release("vae_decoder")
    return pictures


def _engine_sizes(task: Task, levels: int, loras: SideInputs) -> dict[str, dict[str, int]]:
    """What each component is asked for, by the symbols of the manifest."""
    sizes = task.request.engine_sizes(task.manifest, levels)
    for component, symbols in task.engine_sizes().items():
        sizes[component] = {**sizes.get(component, {}), **symbols}
    for component, rank in loras.ranks.items():
        sizes[component][RANK] = rank
    return sizes


def _with_loras(run: Run, components: Components, loras: SideInputs) -> Run:
    """`run`, with what the conditioner's side paths read."""

    def beside(component: str, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        if component == "conditioner":
            inputs = {**inputs, **loras.of(components.engine(component))}
        return run(component, inputs)

    return beside


def _conditions(
    task: Task, encoder: PromptEncoder, start: Start, levels: NDArray[np.float32], run: Run
) -> list[Condition]:
    """What the prompts make of the transformer, and the negative prompts where there are any.

    A task's text stands behind the negative prompts too: one table of positions serves both.
    """
    request = task.request
    guidance = request.guidance_scale if task.manifest.guidance_embedding else None
    text, conditions = start.text, []
    for side in (request.text, request.negative):
        if side is None:
            continue
        encoded = encoder.encode(
            side, request.num_images_per_prompt, request.max_sequence_length, run
        )
        if text is not None:
            encoded, text = with_text(encoded, text)
        conditions.append(condition(encoded, levels, guidance, run))
    return conditions


def _velocities(
    engine: Engine,
    conditions: Sequence[Condition],
    start: Start,
    rows: int,
    columns: int,
    manifest: Manifest,
    side_inputs: Mapping[str, Array],
    cancel: Checked,
) -> list[ModulatedTransformer]:
    """The transformer with all that no step changes in place, once for each condition."""
    text_tokens = conditions[0].context.shape[1]
    ids = joint_ids(text_tokens, rows, columns, len(manifest.rope.axes_dims))
    if start.token_ids is not None:
        ids = np.concatenate([ids, start.token_ids])
    cos, sin = rope_tables(ids, manifest.rope)
    hidden = HiddenStates(start.latents.shape, start.channels, start.tokens)
    fixed = {"rope_cos": cos, "rope_sin": sin, **side_inputs}
    return [ModulatedTransformer(engine, each, fixed, hidden, cancel) for each in conditions]


def _step_made(turn: Turn, start: Start, step: int, latents: NDArray[np.float32]) -> None:
    turn.step_made()
    if start.blend is not None:
        start.blend(step, latents)


def _after_step(
    callback: LevelCallback | None,
    previews: Wanted | None,
    start: Start,
    decode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> StepCallback | None:
    """What comes after each step: a preview where one is due, and the caller's callback."""
    if callback is None and previews is None:
        return None
    sigmas, shown = start.sigmas, None
    if previews is not None:
        steps = previews.after(len(sigmas) - 1)
        shown = Previews(steps, sigmas, decode, previews.show)
        shown.before_step(0, start.latents)

    def on_step_end(step: int, latents: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if shown is not None:
            shown.after_step(step, latents)
        others = None
        if callback is not None:
            others = callback(step, np.float32(sigmas[step]), latents)
        if shown is not None:
            shown.before_step(step + 1, latents if others is None else others)
        return others

    return on_step_end
