"""`generate --prompts --ray`: who draws what, and what becomes of a worker that dies.

A cluster that stands in for Ray runs each call where it is waited for. Ray itself has a test where
it is installed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines import EngineOptions
from fluxdeploy.batch import cluster as module
from fluxdeploy.batch.cluster import Cluster, _anywhere
from fluxdeploy.batch.jobs import Job
from fluxdeploy.batch.order import Order
from fluxdeploy.errors import BundleError, FluxDeployError, NumericError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.lora import LoraFile
from tests.cli.test_generate import FakePipeline, fake, run

__all__ = ["fake"]


class Died(Exception):
    """Stands in for `ray.exceptions.RayActorError`."""


class TaskError(Exception):
    """Stands in for `ray.exceptions.RayTaskError`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Ray:
    """Of the package what `Cluster` uses. deaths: so many calls fail, first of all."""

    exceptions = SimpleNamespace(RayActorError=Died, RayTaskError=TaskError)

    def __init__(self) -> None:
        self.deaths = 0
        self.room = 9
        self.gpus = 0
        self.started: list[dict[str, Any]] = []
        self.killed = 0
        self.open = False

    def init(self, address: str, **_: Any) -> None:
        if address not in ("local", "10.0.0.1:6379"):
            raise ConnectionError("Could not find any running Ray instance.\nMore.")
        self.open = True

    def shutdown(self) -> None:
        self.open = False

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": self.gpus} if self.gpus else {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": True}, {"Alive": False}]

    def kill(self, worker: Any) -> None:
        self.killed += 1

    def remote(self, kind: type) -> Any:
        def start(*arguments: Any) -> Any:
            worker = kind(*arguments)

            def call(name: str) -> Any:
                return SimpleNamespace(
                    remote=lambda *given: Answer(self, name, lambda: getattr(worker, name)(*given))
                )

            return SimpleNamespace(draw=call("draw"), ready=call("ready"))

        def options(**settings: Any) -> Any:
            self.started.append(settings)
            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def wait(self, answers: list[Any], num_returns: int = 1, timeout: float = 0) -> Any:
        count = min(num_returns, self.room)
        return answers[:count], answers[count:]

    def get(self, answer: Answer) -> Any:
        if answer.name == "draw" and self.deaths:
            self.deaths -= 1
            raise Died
        try:
            return answer.work()
        except Exception as error:
            raise TaskError(error) from error


class Answer:
    """Of a call that a worker was given."""

    def __init__(self, ray: Ray, name: str, work: Callable[[], Any]) -> None:
        self.name, self.work = name, work


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    stand_in = Ray()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


def jobs(count: int) -> list[Job]:
    return [
        Job(Order(f"fox {number}"), f"line {number}", (Path(f"{number}.png"),), "")
        for number in range(count)
    ]


def pipeline(content_hash: str = "0", target: str = "cpu") -> Any:
    engine = SimpleNamespace(target=target)
    components = {"transformer": SimpleNamespace(engines=(engine,))}
    manifest = SimpleNamespace(components=components)
    bundle = SimpleNamespace(root=Path("bundle"), content_hash=content_hash, manifest=manifest)
    return SimpleNamespace(bundle=bundle)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What workers' pipelines are opened with; each draws the places of its jobs."""
    found: list[Any] = []

    def from_bundle(*arguments: Any) -> Any:
        found.append(arguments)
        return pipeline()

    def drawn(pipe: Any, group: Any, failed: Any, on_step: Any) -> Any:
        bad = [job for job in group if job.place == "line 1"]
        for job in bad:
            failed(job.place, NumericError("NaN"))
        return [(job, job.place) for job in group if job not in bad]

    monkeypatch.setattr(FluxPipeline, "from_bundle", from_bundle)
    monkeypatch.setattr(module, "drawn_here", drawn)
    return found


def cluster(pipe: Any = None, workers: int | None = 2, address: str = "local") -> Cluster:
    return Cluster(address, pipe or pipeline(), "auto", EngineOptions(), False, workers)


def draw(count: int, workers: int = 2) -> tuple[list[str], list[tuple[str, str]]]:
    """What is drawn of so many jobs, and what fails."""
    bad: list[tuple[str, str]] = []

    def failed(place: str, error: FluxDeployError) -> None:
        bad.append((place, str(error)))

    with cluster(workers=workers) as found:
        groups = [[job] for job in jobs(count)]
        made: list[Any] = [each for _, group in found.draw(groups, failed) for each in group]
    return sorted(drawn for _, drawn in made), bad


def test_all_is_drawn_once_and_what_fails_is_told(ray: Ray, opened: list[Any]) -> None:
    made, bad = draw(7)
    assert made == sorted(f"line {number}" for number in range(7) if number != 1)
    assert bad == [("line 1", "NaN")]
    assert len(opened) == 2, "a worker opens its bundle once"
    assert Path(opened[0][0]).is_absolute()
    assert (ray.killed, ray.open) == (2, False)


def test_what_kills_its_workers_fails_and_the_rest_is_drawn(ray: Ray, opened: list[Any]) -> None:
    """Ray draws again what a dead worker was drawing, and tells of it when that does not help."""
    ray.deaths = 1
    made, bad = draw(3, workers=1)
    assert (ray.started[0]["max_restarts"], ray.started[0]["max_task_retries"]) == (-1, 5)
    assert made == ["line 2"]
    assert [place for place, _ in bad] == ["line 0", "line 1"]
    assert "Workers died 6 times" in bad[0][1]


def test_a_worker_with_another_bundle_is_refused(ray: Ray, opened: list[Any]) -> None:
    with pytest.raises(BundleError, match="not the one here"), cluster(pipeline("1")):
        pass
    assert not ray.open


@pytest.mark.parametrize(
    ("target", "gpus", "expected"), [("cpu", 4, (2, 0)), ("cuda", 4, (4, 1)), ("cuda", 0, (2, 0))]
)
def test_there_is_one_worker_a_device(
    ray: Ray, opened: list[Any], target: str, gpus: int, expected: tuple[int, int]
) -> None:
    ray.gpus = gpus
    with cluster(pipeline(target=target), workers=None) as found:
        assert (len(found._workers), ray.started[0]["num_gpus"]) == expected


def test_a_cluster_without_room_is_refused(ray: Ray, opened: list[Any]) -> None:
    ray.room = 1
    with pytest.raises(UsageError, match="room for 1 workers, not 2"), cluster():
        pass
    assert not ray.open


def test_an_address_without_a_cluster_is_named(ray: Ray) -> None:
    with pytest.raises(UsageError, match=r"at '10.0.0.9:1': Could not find any running"):
        cluster(address="10.0.0.9:1").__enter__()


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install.*\[ray\]"):
        cluster().__enter__()


def test_files_of_a_job_are_found_from_any_folder() -> None:
    order = Order(
        "fox", image=(Path("ring.png"),), lora=(LoraFile(Path("style.safetensors"), 0.5),)
    )
    there = _anywhere(Job(order, "", (), "digest"))
    assert there.order.image == (Path.cwd() / "ring.png",)
    assert there.order.mask_image is None
    assert there.order.lora == (LoraFile(Path.cwd() / "style.safetensors", 0.5),)
    assert there.request == "digest"


@pytest.mark.parametrize(
    "options",
    [["a fox"], ["--prompts", "p.txt", "--preview", "now.png"]],
    ids=["prompt", "preview"],
)
def test_ray_beside_what_it_cannot_do_is_refused(tmp_path: Path, options: list[str]) -> None:
    result = run(*options, "--ray", "local")
    assert result.exit_code == 2
    assert "--ray draws what --prompts has" in result.stderr


def test_a_batch_that_is_done_begins_no_cluster(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(json.dumps({"prompt": "a fox", "seed": 1}) + "\n")
    place = ("--prompts", "p.jsonl", "--bundle", bundle)
    monkeypatch.setattr("fluxdeploy.batch.jobs._TOKENS_AT_ONCE", 0)
    assert run(*place).exit_code == 0
    assert run(*place, "--ray", "local").exit_code == 0
    assert len(FakePipeline.calls) == 1


def test_ray_itself_does_again_what_a_killed_worker_was_doing(tmp_path: Path) -> None:
    """What is taken on trust of it above: also of what is asked while the worker is started."""
    ray = pytest.importorskip("ray")
    marks = str(tmp_path)

    class Mortal:
        def work(self, number: int) -> int:
            mark = os.path.join(marks, str(number))
            if number % 2 == 0 and not os.path.exists(mark):
                open(mark, "w").close()
                os._exit(1)
            return number

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 5}
        worker = ray.remote(Mortal).options(**options).remote()
        assert [ray.get(worker.work.remote(number)) for number in range(4)] == list(range(4))
    finally:
        ray.shutdown()
