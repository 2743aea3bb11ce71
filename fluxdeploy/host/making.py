"""The way of one call: task, prompts, steps, pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.components import Components, Run
from fluxdeploy.host.decoding import decode
from fluxdeploy.host.loop import StepCallback, denoise
from fluxdeploy.host.prompts import Condition, PromptEncoder, condition, with_text
from fluxdeploy.host.tasks.task import Start, Task
from fluxdeploy.host.velocity import HiddenStates, ModulatedTransformer
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.latents import token_grid
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.sampler import load_sampler

__all__ = ["LevelCallback", "make_pictures"]

LevelCallback = Callable[[int, np.float32, NDArray[np.float32]], "NDArray[np.float32] | None"]
"""Called after each step with its index, the noise level it began at, and the live latents; may
return others to go on with."""

SAMPLER = "euler"


def make_pictures(
    task: Task,
    components: Components,
    encoder: PromptEncoder,
    callback: LevelCallback | None,
    cancel: CancelToken,
) -> NDArray[np.float32]:
    """Pictures, float32 [B, H, W, 3] in 0..1.

    Raises `UsageError` for sizes that an engine does not take, `NumericError` for what is not
    finite, and `Cancelled`.
    """
    manifest, request = task.manifest, task.request
    run: Run = functools.partial(components.run, cancel)
    sampler = load_sampler(SAMPLER)
    rows, columns = token_grid(request.height, request.width, manifest.latents)
    sigmas = schedule.sigmas(manifest.schedule, request.num_inference_steps, rows * columns)
    levels = sampler.levels(sigmas[-(task.steps + 1) :])
    components.check_sizes(cancel, _engine_sizes(task, len(levels)))

    start = task.prepare(sigmas, run)
    components.release(*task.components)
    conditions = _conditions(task, encoder, start, sampler.levels(start.sigmas), run)
    components.release("clip", "t5", "conditioner")

    # Before the largest component is opened.
    cancel.check("before the first step")
    velocity, *negative = _velocities(
        components.engine("transformer"), conditions, start, rows, columns, manifest, cancel
    )
    denoise(
        sampler,
        start.latents,
        start.sigmas,
        velocity,
        negative=negative[0] if negative else None,
        true_cfg_scale=request.true_cfg_scale,
        blend=start.blend,
        on_step_end=None if callback is None else _with_level(callback, start.sigmas),
        cancel=cancel,
    )
    components.release("transformer")
    pictures = decode(start.latents, request.height, request.width, manifest.latents, run, cancel)
    components.release("vae_decoder")
    return pictures


def _engine_sizes(task: Task, levels: int) -> dict[str, dict[str, int]]:
    """What each component is asked for, by the symbols of the manifest."""
    sizes = task.request.engine_sizes(task.manifest, levels)
    for component, symbols in task.engine_sizes().items():
        sizes[component] = {**sizes.get(component, {}), **symbols}
    return sizes


def _conditions(
    task: Task, encoder: PromptEncoder, start: Start, levels: NDArray[np.float32], run: Run
) -> list[Condition]:
    """What the prompts make of the transformer, and the negative prompts where there are any.

    A task's text stands behind the negative prompts too: one table of positions serves both.
    """
    request = task.request
    guidance = request.guidance_scale if task.manifest.guidance_embedding else None
    text, conditions = start.text, []
    for prompts in (request.prompts, request.negative_prompts):
        if prompts is None:
            continue
        encoded = encoder.encode(
            prompts, request.num_images_per_prompt, request.max_sequence_length, run
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
    cancel: CancelToken,
) -> list[ModulatedTransformer]:
    """The transformer with all that no step changes in place, once for each condition."""
    text_tokens = conditions[0].context.shape[1]
    ids = joint_ids(text_tokens, rows, columns, len(manifest.rope.axes_dims))
    if start.token_ids is not None:
        ids = np.concatenate([ids, start.token_ids])
    cos, sin = rope_tables(ids, manifest.rope)
    hidden = HiddenStates(start.latents.shape, start.channels, start.tokens)
    positions = {"rope_cos": cos, "rope_sin": sin}
    return [ModulatedTransformer(engine, each, positions, hidden, cancel) for each in conditions]


def _with_level(callback: LevelCallback, sigmas: NDArray[np.float32]) -> StepCallback:
    return lambda step, latents: callback(step, np.float32(sigmas[step]), latents)
