"""A batch over a Ray cluster: one worker a device draws, and this process writes.

A worker is an actor that opens the bundle for itself. One that dies, with its machine or by itself,
is started again by Ray, and what it was drawing is drawn again: nothing of it was written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fluxdeploy.batch.draw import Drawn
from fluxdeploy.batch.here import drawn_here
from fluxdeploy.batch.jobs import Job
from fluxdeploy.batch.plan import Failed
from fluxdeploy.errors import BundleError, EngineError, FluxDeployError, UsageError
from fluxdeploy.install import install_command

if TYPE_CHECKING:
    from engines.base import EngineOptions
    from fluxdeploy.host.pipeline import FluxPipeline

__all__ = ["LOCAL", "Cluster"]

LOCAL = "local"
"""The address of a cluster that is begun on this machine, and ends with the batch."""

_TRIES = 6
"""How often a call is drawn whose worker dies: it may be what kills them. One that is asked for too
early, while its worker is started again, counts too."""

_SECONDS_TO_START = 120.0

Made = list[tuple[Job, tuple[Drawn, ...]]]


class _Worker:
    """What runs on a device of the cluster; its pipeline is opened by the first call."""

    def __init__(
        self, bundle: Path, content_hash: str, runtime: str, options: EngineOptions, low_vram: bool
    ) -> None:
        self._opening = bundle, runtime, options, low_vram
        self._content_hash = content_hash
        self._pipe: FluxPipeline | None = None

    def ready(self) -> None:
        """Open the bundle. Raises `BundleError` where it is another one there."""
        from fluxdeploy.host.pipeline import FluxPipeline

        if self._pipe is None:
            pipe = FluxPipeline.from_bundle(*self._opening)
            if pipe.bundle.content_hash != self._content_hash:
                raise BundleError(
                    f"The bundle {pipe.bundle.root} of a worker is not the one here. Give all "
                    "machines the same."
                )
            self._pipe = pipe

    def draw(self, group: Sequence[Job]) -> tuple[Made, list[tuple[str, FluxDeployError]]]:
        """The pictures of jobs that are one call, and what of it cannot be drawn."""
        self.ready()
        assert self._pipe is not None
        bad: list[tuple[str, FluxDeployError]] = []
        made = drawn_here(
            self._pipe, group, lambda place, error: bad.append((place, error)), lambda: None
        )
        return made, bad


class Cluster:
    """The workers of a batch; a context manager.

    address: of a Ray cluster, or `LOCAL`. workers: how many; where None one for each GPU, for a
    bundle that is for GPUs, and else one for each machine. Raises `UsageError` without Ray, and
    where nothing is at the address.
    """

    def __init__(
        self,
        address: str,
        pipe: FluxPipeline,
        runtime: str,
        options: EngineOptions,
        low_vram: bool,
        workers: int | None,
    ) -> None:
        self._address = address
        self._bundle = pipe.bundle
        root = Path(os.path.abspath(pipe.bundle.root))
        self._arguments = root, pipe.bundle.content_hash, runtime, options, low_vram
        self._wanted = workers
        self._workers: list[Any] = []

    def __enter__(self) -> Cluster:
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                f"--ray needs {error.name}. Install it with `{install_command('ray')}`."
            ) from error
        self._ray = ray
        try:
            ray.init(
                address=self._address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({"include_dashboard": False} if self._address == LOCAL else {}),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"No Ray cluster answers at {self._address!r}: {_first_line(error)}. Give the "
                f"address of one, or --ray {LOCAL}."
            ) from error
        try:
            self._start()
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        self._ray.shutdown()

    def draw(
        self, groups: Iterable[Sequence[Job]], failed: Failed
    ) -> Iterator[tuple[Sequence[Job], Made]]:
        """Each group with the pictures of it that could be drawn, in the order of their ends.

        A group whose workers die again and again fails. Raises what ends a batch.
        """
        waiting, free = iter(groups), list(self._workers)
        running: dict[Any, tuple[Any, Sequence[Job]]] = {}
        while True:
            while free and (group := next(waiting, None)) is not None:
                worker = free.pop()
                answer = worker.draw.remote([_anywhere(job) for job in group])
                running[answer] = worker, group
            if not running:
                return
            (done,), _ = self._ray.wait(list(running))
            worker, group = running.pop(done)
            free.append(worker)
            try:
                made, bad = self._answer(done)
            except self._ray.exceptions.RayActorError:
                words = (
                    f"Workers died {_TRIES} times while they drew it. See what their systems say; "
                    "memory may have run out."
                )
                made, bad = [], [(job.place, EngineError(words)) for job in group]
            for place, error in bad:
                failed(place, error)
            yield group, made

    def _start(self) -> None:
        """Begin the workers, and wait for those that there is room for."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0)) if self._is_for_gpus() else 0
        machines = sum(node["Alive"] for node in self._ray.nodes())
        count = self._wanted or gpus or machines
        # `SPREAD` puts them on different machines where it can.
        remote = self._ray.remote(_Worker).options(
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            max_restarts=-1,
            # Without any, what is asked of a worker that is being started again fails at once.
            max_task_retries=_TRIES - 1,
            scheduling_strategy="SPREAD",
        )
        self._workers = [remote.remote(*self._arguments) for _ in range(count)]
        opened = {worker.ready.remote(): worker for worker in self._workers}
        ready, late = self._ray.wait(
            list(opened), num_returns=len(opened), timeout=_SECONDS_TO_START
        )
        for answer in ready:
            try:
                self._answer(answer)
            except self._ray.exceptions.RayActorError as error:
                raise EngineError(f"A worker does not start: {_first_line(error)}.") from error
        if late:
            raise UsageError(
                f"The cluster has room for {len(ready)} workers, not {count}: each takes a CPU"
                f"{' and a GPU' if gpus else ''}. Give fewer with --workers."
            )

    def _is_for_gpus(self) -> bool:
        engines = self._bundle.manifest.components["transformer"].engines
        return all(engine.target != "cpu" for engine in engines)

    def _answer(self, done: Any) -> Any:
        """What a worker has returned; raises what it has raised, as it was raised there."""
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise


def _anywhere(job: Job) -> Job:
    """The job with files that are found from any folder."""
    order = job.order

    def absolute(path: Path) -> Path:
        return Path(os.path.abspath(path))

    seen = (order.ip_adapter_image, order.negative_ip_adapter_image)
    positive, negative = (None if path is None else absolute(path) for path in seen)
    order = replace(
        order,
        ip_adapter_image=positive,
        negative_ip_adapter_image=negative,
        image=tuple(map(absolute, order.image)),
        mask_image=order.mask_image and absolute(order.mask_image),
        control_image=tuple(map(absolute, order.control_image)),
        redux_image=tuple(map(absolute, order.redux_image)),
        lora=tuple(replace(lora, path=absolute(lora.path)) for lora in order.lora),
    )
    return replace(job, order=order)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
