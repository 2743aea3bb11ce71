"""A server under load: nothing lost, nothing mixed up, and what serving costs.

`python benchmarks/soak.py --json benchmarks/results/soak.json --plot docs/soak.png`

First in this process, side by side with the pipeline itself: what the server adds to a request and
to throughput, what a repeated prompt saves, what previews cost, how soon a cancelled call is gone,
what a batch gains. Then the soak, on a server of its own: requests of three priorities and mixed
sizes, a third of them left at a random step, a tenth of them wrong; every picture is compared with
the one that the pipeline draws of its seed.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
import uvicorn
from PIL import Image

from fluxdeploy import FluxPipeline
from fluxdeploy.host.asynchronous import AsyncFluxPipeline, Preview, StepEnd
from fluxdeploy.machine import describe_machine
from fluxdeploy.serve.images_api.app import create_app
from fluxdeploy.serve.images_api.server import listen, local_backend
from fluxdeploy.serve.images_api.settings import Settings

PROMPT = "a red circle above a blue square"
SIZES = ((64, 64), (96, 64), (96, 96), (128, 128))
STEPS = (3, 6, 10)
SEEDS = range(8)
PRIORITIES = ("high", "normal", "low")
WRONG: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": PROMPT, "sed": 1},
    {"prompt": PROMPT, "size": "50x50"},
    {"prompt": PROMPT, "num_inference_steps": 10_000},
    {"prompt": PROMPT, "guidance_scale": "high"},
)
CLIENTS = 12


@dataclass(frozen=True)
class Answer:
    """What became of a request: `kind` is "drawn", "left", "refused" or "lost"."""

    kind: str
    priority: str
    began: float
    seconds: float


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else float("nan")


def post(url: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.request(
        "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    answer.connection = connection  # type: ignore[attr-defined]
    return answer


def picture(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def in_this_process(pipeline: FluxPipeline) -> Iterator[str]:
    """The URL of a server over a pipeline of this process."""
    app = create_app(local_backend(pipeline), Settings("demo", max_steps=400))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with listen("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([opened])), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def measure_overhead(pipeline: FluxPipeline, url: str, rounds: int) -> dict[str, float]:
    """Milliseconds that the server adds to a request, and its share of throughput, in turns."""
    body = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 6, "size": "96x96"}

    def direct() -> None:
        pipeline(PROMPT, seed=1, num_inference_steps=6, width=96, height=96)

    def served() -> None:
        json.load(post(url, body))

    alone, added = [], []
    for _ in range(rounds):
        base = timed(direct)
        alone.append(base)
        added.append(timed(served) - base)

    def together(work: Callable[[], None]) -> float:
        with ThreadPoolExecutor(8) as pool:
            return timed(lambda: list(pool.map(lambda _: work(), range(32))))

    ratios = [together(served) / together(direct) for _ in range(5)]
    return {
        "direct_ms": 1000 * statistics.median(alone),
        "added_ms": 1000 * statistics.median(added),
        "throughput_ratio": statistics.median(ratios),
    }


def measure_prompts(pipeline: FluxPipeline, rounds: int) -> dict[str, float]:
    """Milliseconds of encoding, for a new prompt and for one that came before."""

    def encoding(prompt: str) -> float:
        output = pipeline(prompt, seed=1, num_inference_steps=1, width=64, height=64)
        return 1000 * output.seconds["encoding"]

    fresh = [encoding(f"{PROMPT} {number}") for number in range(rounds)]
    repeated = [encoding(PROMPT) for _ in range(rounds)]
    return {"fresh_ms": statistics.median(fresh), "repeated_ms": statistics.median(repeated)}


def measure_previews(pipeline: FluxPipeline, rounds: int) -> dict[str, float]:
    """When the first of three previews is there, as a share of the picture's time, and the cost."""

    async def watch() -> tuple[float, float]:
        began, first = time.perf_counter(), 0.0
        async for event in AsyncFluxPipeline(pipeline).stream(PROMPT, seed=1, num_previews=3):
            if isinstance(event, Preview) and first == 0:
                first = time.perf_counter() - began
        return first, time.perf_counter() - began

    shares, watched, plain = [], [], []
    for _ in range(rounds):
        first, whole = asyncio.run(watch())
        shares.append(first / whole)
        watched.append(whole)
        plain.append(timed(lambda: pipeline(PROMPT, seed=1)))
    cost = statistics.median(watched) / statistics.median(plain) - 1
    return {"first_share": statistics.median(shares), "cost": cost}


def measure_cancel(pipeline: FluxPipeline, rounds: int) -> dict[str, float]:
    """Milliseconds from leaving a call at a random step to free engines, and those of a step."""

    async def leave(after: int) -> tuple[float, float]:
        stream = AsyncFluxPipeline(pipeline).stream(PROMPT, seed=1, num_inference_steps=100)
        before = step = 0.0
        async for event in stream:
            now = time.perf_counter()
            step, before = now - before, now
            if isinstance(event, StepEnd) and event.step == after:
                break
        began = time.perf_counter()
        await stream.aclose()  # type: ignore[attr-defined]
        while pipeline.stats.running:
            await asyncio.sleep(0.0002)
        return time.perf_counter() - began, step

    source = random.Random(0)
    found = [asyncio.run(leave(source.randint(2, 12))) for _ in range(rounds)]
    beyond = [1000 * (free - step) for free, step in found]
    return {
        "step_ms": 1000 * statistics.median(step for _, step in found),
        "free_p50_ms": 1000 * percentile([free for free, _ in found], 0.5),
        "free_p95_ms": 1000 * percentile([free for free, _ in found], 0.95),
        "beyond_a_step_p95_ms": percentile(beyond, 0.95),
    }


def measure_batches(pipeline: FluxPipeline) -> list[dict[str, float]]:
    """Milliseconds a picture, drawn one at a time and four at once."""
    rows = []
    for side in (64, 96, 128, 160):

        def draw(count: int, side: int = side) -> float:
            prompts = [PROMPT] * count
            options = {"seed": 1, "num_inference_steps": 6, "width": side, "height": side}
            return timed(lambda: pipeline(prompts, **options)) / count

        draw(1), draw(4)
        pairs = [(draw(1), draw(4)) for _ in range(7)]
        one, four = (1000 * statistics.median(values) for values in zip(*pairs, strict=True))
        rows.append({"side": side, "one_ms": one, "four_ms": four})
    return rows


class Load:
    """The soak's clients, and what they expect."""

    def __init__(self, url: str, expected: dict[tuple[Any, ...], np.ndarray]) -> None:
        self._url = url
        self._expected = expected

    def ask(self, number: int) -> Answer:
        """One request of the mixture."""
        source = random.Random(number)
        priority = source.choices(PRIORITIES, (1, 2, 2))[0]
        began, draw = time.perf_counter(), source.random()
        if draw < 0.1:
            answer = post(self._url, source.choice(WRONG))
            kind = "refused" if answer.status == 400 and "error" in json.load(answer) else "lost"
        else:
            kind = self._draw(source, priority, leaves=draw < 0.1 + 1 / 3)
        return Answer(kind, priority, began, time.perf_counter() - began)

    def _draw(self, source: random.Random, priority: str, leaves: bool) -> str:
        key = width, height, steps, seed = (
            *source.choice(SIZES),
            source.choice(STEPS),
            source.choice(SEEDS),
        )
        body = {
            "prompt": PROMPT,
            "size": f"{width}x{height}",
            "num_inference_steps": steps,
            "seed": seed,
            "priority": priority,
        }
        if not leaves:
            answer = json.load(post(self._url, body))
            if "data" not in answer:
                return "lost"
            right = np.array_equal(picture(answer["data"][0]["b64_json"]), self._expected[key])
            return "drawn" if right else "mixed up"
        # At step 0 it may still be waiting.
        after = source.randrange(steps)
        answer = post(self._url, {**body, "stream": True, "stream_steps": True})
        for _ in range(3 * after):  # lines of an event
            answer.readline()
        answer.connection.close()  # type: ignore[attr-defined]
        answer.close()
        return "left"


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of a process's memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return 1024 * int(found[1])


@contextmanager
def own_process(bundle: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of `fluxdeploy serve`, and its process."""
    command = [sys.executable, "-m", "fluxdeploy", "serve", "--bundle", str(bundle), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        process.stderr.readline()
        yield process.stderr.readline().split()[-1], process
    finally:
        process.terminate()
        process.wait()


def high_latencies(url: str, count: int) -> list[float]:
    """Seconds of requests of the highest priority, one after the other."""
    body = {"prompt": PROMPT, "size": "96x96", "num_inference_steps": 6, "priority": "high"}
    return [timed(lambda: json.load(post(url, body))) for _ in range(count)]


def soak(bundle: Path, expected: dict[tuple[Any, ...], np.ndarray], count: int) -> dict[str, Any]:
    """The soak, and how it went for the highest priority alone and beside a large batch."""
    with own_process(bundle) as (url, process):
        alone = high_latencies(url, 40)
        stop = threading.Event()

        def batch() -> None:
            body = {"prompt": PROMPT, "size": "160x160", "num_inference_steps": 28, "n": 4}
            while not stop.is_set():
                json.load(post(url, {**body, "priority": "low"}))

        threads = [threading.Thread(target=batch) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        beside = high_latencies(url, 40)
        stop.set()
        for thread in threads:
            thread.join()

        load, began = Load(url, expected), time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            warm = [
                future.result()
                for future in [pool.submit(load.ask, number) for number in range(count // 5)]
            ]
            before = resident(process)
            answers = [
                *warm,
                *(
                    future.result()
                    for future in [
                        pool.submit(load.ask, number) for number in range(count // 5, count)
                    ]
                ),
            ]
        seconds, after = time.perf_counter() - began, resident(process)
    drawn = [answer for answer in answers if answer.kind == "drawn"]
    return {
        "requests": count,
        "seconds": seconds,
        "kinds": {
            kind: sum(answer.kind == kind for answer in answers)
            for kind in ("drawn", "left", "refused", "mixed up", "lost")
        },
        "memory_growth": after / before - 1,
        "high_alone_p95": percentile(alone, 0.95),
        "high_beside_batch_p95": percentile(beside, 0.95),
        "latency": {
            priority: {
                f"p{share}": percentile(
                    [each.seconds for each in drawn if each.priority == priority], share / 100
                )
                for share in (50, 90, 95, 99)
            }
            for priority in PRIORITIES
        },
        "ends": [round(each.began + each.seconds - began, 3) for each in drawn],
        "seconds_by_priority": {
            priority: [round(each.seconds, 4) for each in drawn if each.priority == priority]
            for priority in PRIORITIES
        },
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Latencies by priority, and pictures a second over the soak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for priority, values in report["soak"]["seconds_by_priority"].items():
        ordered = np.sort(values)
        left.plot(ordered, np.linspace(0, 100, len(ordered)), label=priority)
    left.set_xlabel("seconds from request to picture")
    left.set_ylabel("% of requests")
    left.set_xscale("log")
    left.legend(title="priority")
    left.grid(alpha=0.3)
    ends = np.array(report["soak"]["ends"])
    edges = np.arange(0, ends.max() + 5, 5)
    right.plot(edges[:-1], np.histogram(ends, edges)[0] / 5)
    right.set_ylim(bottom=0)
    right.set_xlabel("seconds of the soak")
    right.set_ylabel("pictures a second")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), default=Path("bundle"))
@click.option("--requests", type=int, default=2000)
@click.option("--rounds", type=int, default=40)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(path_type=Path))
def main(
    bundle: Path, requests: int, rounds: int, json_path: Path | None, plot_path: Path | None
) -> None:
    """Measure what serving costs, and let a server stand a mixed load."""
    report: dict[str, Any] = {"machine": describe_machine(["numpy", "onnxruntime", "uvicorn"])}
    with FluxPipeline.from_bundle(bundle) as pipeline:
        with in_this_process(pipeline) as url:
            report["overhead"] = measure_overhead(pipeline, url, rounds)
        report["prompts"] = measure_prompts(pipeline, rounds)
        report["previews"] = measure_previews(pipeline, rounds // 4)
        report["cancel"] = measure_cancel(pipeline, 5 * rounds)
        report["batches"] = measure_batches(pipeline)
        for name in ("overhead", "prompts", "previews", "cancel", "batches"):
            print(name, json.dumps(report[name]))
        expected = {}
        for width, height in SIZES:
            for steps in STEPS:
                for seed in SEEDS:
                    options = {"width": width, "height": height, "num_inference_steps": steps}
                    images = pipeline(PROMPT, seed=seed, **options).images
                    expected[width, height, steps, seed] = np.asarray(images[0])
    report["soak"] = soak(bundle, expected, requests)
    shown = {
        name: value
        for name, value in report["soak"].items()
        if name not in ("ends", "seconds_by_priority")
    }
    print("soak", json.dumps(shown))
    if plot_path is not None:
        plot(report, plot_path)
    if json_path is not None:
        with suppress(KeyError):
            del report["soak"]["ends"], report["soak"]["seconds_by_priority"]
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    kinds = report["soak"]["kinds"]
    sys.exit(1 if kinds["lost"] or kinds["mixed up"] else 0)


if __name__ == "__main__":
    main()
