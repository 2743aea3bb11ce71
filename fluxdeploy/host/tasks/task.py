"""What a task is: what a picture is made from, besides its prompt.

A task is one module with one class, which `fluxdeploy.host.pipeline` lists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.loop import Blend
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.sampling.sampler import load_sampler
from fluxdeploy.sampling.skipping import Skips

__all__ = ["ControlInput", "Start", "Task", "choose_task"]


@dataclass(frozen=True)
class ControlInput:
    """What a ControlNet reads, and how much it counts.

    component: the ControlNet's. latents: float32 [B, L, C], packed. mode: the kind of control,
    None where it knows one alone. scales: float32 [N], what its residuals are multiplied with.
    """

    component: str
    latents: NDArray[np.float32]
    mode: int | None
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class Start:
    """What the loop begins with, for B pictures of L tokens with C channels.

    latents: float32 [B, L, C], packed; the loop works on them in place.
    sigmas: float32 [N + 1], the noise levels that it goes through.
    channels: float32 [B, L, C'], put beside the latents' channels in every step.
    tokens: float32 [B, R, C + C'], put behind the latents in every step, with ids [R, axes]; the
        velocity of these is cut off.
    blend: changes the latents after every step.
    controls: of the ControlNets that run beside the transformer.
    """

    latents: NDArray[np.float32]
    sigmas: NDArray[np.float32]
    channels: NDArray[np.float32] | None = None
    tokens: NDArray[np.float32] | None = None
    token_ids: NDArray[np.float64] | None = None
    blend: Blend | None = None
    controls: tuple[ControlInput, ...] = ()


@dataclass(frozen=True)
class Task(ABC):
    """A request for one task, with the task's own arguments read and checked.

    chosen_by: the arguments of `FluxPipeline.__call__` that ask for this task, None by default.
    options: its other arguments, with their defaults.
    components: what it needs of a bundle beyond the components that every picture takes.
    draws_more: whether it draws random numbers beside the noise that `latents` stand for.
    """

    name: ClassVar[str]
    chosen_by: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, object]] = {}
    components: ClassVar[tuple[str, ...]] = ()
    draws_more: ClassVar[bool] = False

    request: GenerationRequest
    manifest: Manifest

    @classmethod
    def size(
        cls,
        manifest: Manifest,
        height: int | None,
        width: int | None,
        arguments: Mapping[str, Any],
    ) -> tuple[int | None, int | None]:
        """Height and width of the pictures, for those that are asked for; None is the bundle's.

        Raises `UsageError` for a value that cannot be.
        """
        return height, width

    @classmethod
    @abstractmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> Task:
        """The task of a request, with `chosen_by` and `options` in `arguments`.

        Raises `UsageError` for a value that cannot be.
        """

    @property
    def steps(self) -> int:
        """N: how many of the schedule's steps are made."""
        return self.request.num_inference_steps

    @property
    def skips(self) -> Skips | None:
        """The steps that are skipped, of those that are made; None where there are none."""
        skip = self.request.skip
        return None if skip is None else skip.after(self.request.num_inference_steps - self.steps)

    @property
    def evaluations(self) -> int:
        """How often the velocity is taken."""
        skipped = 0 if self.skips is None else len(self.skips.steps)
        return load_sampler(self.request.sampler).evaluations(self.steps) - skipped

    @property
    def reference_tokens(self) -> int:
        """R: the tokens behind the latents, which the transformer reads with them."""
        return 0

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        """What components are asked for otherwise than for a picture from text alone."""
        return {}

    def notices(self) -> tuple[str, ...]:
        """Arguments that do nothing here, a sentence each."""
        return ()

    @abstractmethod
    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        """What the loop begins with; `sigmas` is the whole schedule, float32 [N + 1]."""

    def finish(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the caller gets of a decoded picture; both are float32 [H, W, 3] in 0..1."""
        return picture


def choose_task(
    tasks: Sequence[type[Task]], able: Sequence[str], arguments: Mapping[str, object]
) -> tuple[type[Task], tuple[str, ...]]:
    """The task that a call's arguments ask for, and a sentence for each that does nothing in it.

    able: the names of those that a bundle does. arguments: all that belong to tasks. Of the tasks
    whose `chosen_by` are all given, the one with the most of them is meant. Raises `UsageError`
    where an argument asks for something else too, or for what the bundle does not do.
    """
    given = [name for name, value in arguments.items() if not _is_default(tasks, name, value)]
    own = [task for task in tasks if task.name in able]
    fitting = [task for task in own if set(task.chosen_by) <= set(given)]
    if not fitting:
        raise UsageError(f"This bundle's model is one for {_ways(own)}. Give what it takes.")
    task = max(fitting, key=lambda task: len(task.chosen_by))
    notices = []
    for name in given:
        if name in task.chosen_by or name in task.options:
            continue
        takers = [other for other in own if name in other.options]
        if not takers:
            raise UsageError(_refusal(tasks, own, task, name))
        # Where `image` will do, `image` and `mask_image` need not be said.
        least = [set(other.chosen_by) for other in takers]
        needed = " or ".join(
            _quoted(other.chosen_by)
            for other in takers
            if not any(fewer < set(other.chosen_by) for fewer in least)
        )
        notices.append(f"`{name}` does nothing without {needed}.")
    return task, tuple(notices)


def _is_default(tasks: Sequence[type[Task]], name: str, value: object) -> bool:
    default = next((task.options[name] for task in tasks if name in task.options), None)
    # Arrays are given, and have no one answer to `==`.
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


def _refusal(
    tasks: Sequence[type[Task]], own: Sequence[type[Task]], task: type[Task], name: str
) -> str:
    wanted = [other for other in own if name in other.chosen_by]
    if wanted:
        ways = "; ".join(f"{other.name} takes {_quoted(other.chosen_by)}" for other in wanted)
        return f"`{name}` has no place in {task.name}: {ways}. Give what one task takes."
    # Several tasks of one name are one with other things beside it.
    others = dict.fromkeys(o.name for o in tasks if name in o.chosen_by or name in o.options)
    if not others:
        return f"This version has no task that takes `{name}`. Leave it out."
    return (
        f"`{name}` has no place in {task.name}: it is for {' and '.join(others)}, and this "
        f"bundle's model is one for {_ways(own)}. Leave it out, or build a checkpoint that is."
    )


def _ways(tasks: Sequence[type[Task]]) -> str:
    """The tasks, each with what asks for it."""
    return ", ".join(
        f"{task.name} (with {_quoted(task.chosen_by)})" if task.chosen_by else task.name
        for task in tasks
    )


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
