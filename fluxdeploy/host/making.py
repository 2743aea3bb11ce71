"""The way of one call: task, prompts, steps, pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Engine
from fluxdeploy.bundle.boundary import REDUX
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.components import Components, Run
from fluxdeploy.host.decoding import decode
from fluxdeploy.host.ip_adapter import AdapterInputs, Seen
from fluxdeploy.host.loop import StepCallback, denoise
from fluxdeploy.host.loras import SideInputs
from fluxdeploy.host.previews import Previews, Wanted, linear_pictures
from fluxdeploy.host.prompts import Condition, EncodedPrompts, PromptEncoder, condition
from fluxdeploy.host.residuals import ControlResiduals, RunningControlNet
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
    adapter: AdapterInputs,
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
    for component, symbols in adapter.engine_sizes().items():
        sizes[component] = {**sizes.get(component, {}), **symbols}
    if latents_only:
        del sizes["vae_decoder"]
    components.check_sizes(turn, sizes)

    start = task.prepare(sigmas, run)
    components.release_all()
    seen = adapter.encode(run)
    components.release_all()
    beside = _with_loras(run, components, loras)
    texts = _texts(task, encoder, beside)
    levels = sampler.levels(start.sigmas)
    guidance = request.guidance_scale if manifest.guidance_embedding else None
    conditions = [condition(text, levels, guidance, beside) for text in texts]
    controls = _control_conditions(task, start, texts[0], levels, run)
    components.release("clip", "t5", REDUX, "conditioner", *map(_conditioner, controls))

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
        tables = [_tables(each, start, rows, columns, manifest) for each in conditions]
        residuals = ControlResiduals(
            transformer,
            [
                RunningControlNet(
                    components.engine(each.component),
                    controls[each.component],
                    each.latents,
                    each.scales,
                )
                for each in start.controls
                if each.component in controls
            ],
            tables[0],
            len(conditions) > 1,
            functools.partial(turn.check, "in the middle of a step"),
        )
        velocity, *negative = _velocities(
            transformer,
            conditions,
            start,
            [{**each, **loras.of(transformer)} for each in tables],
            residuals if controls else None,
            seen,
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
            blend=functools.partial(_step_made, turn, start, residuals),
            on_step_end=_after_step(callback, previews, start, previewed),
            cancel=turn,
            interrupted=interrupted,
        )
    components.release("transformer", *controls)
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


def _texts(task: Task, encoder: PromptEncoder, run: Run) -> list[EncodedPrompts]:
    """The prompts, with pictures behind them where there are any, and the negative prompts."""
    request = task.request
    texts = [
        encoder.encode(side, request.num_images_per_prompt, request.max_sequence_length, run)
        for side in (request.text, request.negative)
        if side is not None
    ]
    if request.redux is not None:
        texts[0] = encoder.with_pictures(texts[0], request.redux, run)
    return texts


def _control_conditions(
    task: Task, start: Start, text: EncodedPrompts, levels: NDArray[np.float32], run: Run
) -> dict[str, Condition]:
    """What the prompts make of each ControlNet that counts in some step, by its component."""
    found = {}
    for control in start.controls:
        if not control.scales.any():
            continue
        name = _conditioner(control.component)
        inputs = {spec.name for spec in task.manifest.components[name].inputs}
        guidance = task.request.guidance_scale if "guidance" in inputs else None
        found[control.component] = condition(text, levels, guidance, run, name, control.mode)
    return found


def _conditioner(controlnet: str) -> str:
    return f"{controlnet}_conditioner"


def _tables(
    condition: Condition, start: Start, rows: int, columns: int, manifest: Manifest
) -> dict[str, Array]:
    """The position tables of text, picture and a task's own tokens."""
    ids = joint_ids(condition.context.shape[1], rows, columns, len(manifest.rope.axes_dims))
    if start.token_ids is not None:
        ids = np.concatenate([ids, start.token_ids])
    cos, sin = rope_tables(ids, manifest.rope)
    return {"rope_cos": cos, "rope_sin": sin}


def _velocities(
    engine: Engine,
    conditions: Sequence[Condition],
    start: Start,
    fixed: Sequence[Mapping[str, Array]],
    residuals: ControlResiduals | None,
    seen: Sequence[Seen | None],
    cancel: Checked,
) -> list[ModulatedTransformer]:
    """The transformer with all that no step changes in place, once for each condition."""
    hidden = HiddenStates(start.latents.shape, start.channels, start.tokens)
    # The prompts' evaluation comes first, and the negative prompts' takes over its residuals.
    added = [None, None] if residuals is None else [residuals.compute, residuals.recall]
    return [
        ModulatedTransformer(engine, each, own, hidden, cancel, more, sees)
        for each, own, more, sees in zip(conditions, fixed, added, seen, strict=False)
    ]


def _step_made(
    turn: Turn,
    start: Start,
    residuals: ControlResiduals,
    step: int,
    latents: NDArray[np.float32],
) -> None:
    turn.step_made()
    residuals.step = step + 1
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
