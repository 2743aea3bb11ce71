"""The repositories of `fluxdeploy triton` on a real Triton server, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy import FluxPipeline
from fluxdeploy.bundle import open_bundle
from fluxdeploy.errors import (
    EngineError,
    QueueFullError,
    UsageError,
)
from fluxdeploy.host.asynchronous import Preview, StepEnd
from fluxdeploy.host.pipeline import FluxPipelineOutput
from fluxdeploy.serve.triton.backend import TritonBackend
from fluxdeploy.serve.triton.config import Settings
from fluxdeploy.serve.triton.repository import write_repository
from tests.serve.test_images_api import post as ask
from tests.support.triton_server import TritonServer, missing, serve

pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

WAITING = 20
GENERATE = 400
"""What the server's `generate` answers to every error; gRPC has a code of its own for each."""

SMALL = {"height": 48, "width": 64, "num_inference_steps": 2}
LONG = {"height": 64, "width": 64, "num_inference_steps": 1000}


@pytest.fixture(scope="session")
def repository(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "model_repository"
    settings = Settings(runtime="onnxruntime", max_waiting=WAITING)
    write_repository(open_bundle(demo_bundle), folder, "pipeline", settings)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    log = repository.with_name("server.log")
    with serve(repository, log) as running:
        yield running
    # All requests are gone, cancelled ones too: the model was unloaded in time.
    assert "Exit timeout expired" not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def pipe(demo_bundle: Path) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(demo_bundle, runtime="onnxruntime") as opened:
        yield opened


def run(server: TritonServer, work: Callable[[TritonBackend], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` gives, of a client."""

    async def connected() -> Any:
        async with await TritonBackend.connect(server.grpc) as backend:
            return await asyncio.wait_for(work(backend), 60)

    return asyncio.run(connected())


def post(server: TritonServer, fields: dict[str, object], how: str = "generate") -> str:
    """The answer over HTTP. Raises `HTTPError`."""
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"http://{server.http}/v2/models/flux/{how}", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def refusal(server: TritonServer, fields: dict[str, object]) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, fields)
    return caught.value.code, json.loads(caught.value.read())["error"]


def pixels(images: object) -> list[bytes]:
    assert isinstance(images, list)
    return [np.asarray(image).tobytes() for image in images]


def png(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait until it holds; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


GRADIENT = np.linspace(0, 255, 32 * 40 * 3).astype(np.uint8).reshape(32, 40, 3)
MASK = np.repeat(np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 16, 0), 20, 1)
LATENTS = np.random.default_rng(3).standard_normal((1, 12, 64)).astype(np.float32)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 2**63 + 5},
        {"seed": 7, "negative_prompt": "a blue ring", "true_cfg_scale": 1.7},
        {"seed": 7, "num_images_per_prompt": 2, "guidance_scale": 4.1, "max_sequence_length": 12},
        {"seed": 7, "image": GRADIENT, "strength": 0.7, "num_inference_steps": 10},
        {"seed": 7, "image": GRADIENT, "mask_image": MASK, "num_inference_steps": 4},
        {
            "seed": 7,
            "image": Image.fromarray(GRADIENT),
            "mask_image": Image.fromarray(MASK),
            "padding_mask_crop": 4,
        },
        {"latents": LATENTS},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_pictures_are_those_of_the_pipeline(
    server: TritonServer, pipe: FluxPipeline, arguments: dict[str, Any]
) -> None:
    prompts = ["a red ring", "a green star"] if "num_images_per_prompt" in arguments else "a heart"
    arguments = {**SMALL, **arguments}
    expected = pipe(prompts, **arguments)
    found = run(server, lambda backend: backend(prompts, **arguments))
    assert pixels(found.images) == pixels(expected.images)
    assert found.seed == expected.seed
    assert found.seconds.keys() == {"queued", "encoding", "denoising", "decoding"}


def test_http_gives_the_same_picture_as_a_png(server: TritonServer, pipe: FluxPipeline) -> None:
    file = io.BytesIO()
    Image.fromarray(GRADIENT).save(file, format="PNG")
    fields = {"seed": 5, "strength": 0.7, "num_inference_steps": 10, "height": 48, "width": 64}
    expected = pipe("a heart", image=GRADIENT, **fields)
    given = base64.b64encode(file.getvalue()).decode()
    answer = json.loads(
        post(
            server,
            {"prompt": "a heart", "image_bytes": given, "response_format": "b64_json", **fields},
        )
    )
    assert pixels([png(answer["b64_json"])]) == pixels(expected.images)
    assert (answer["event"], answer["seeds"], answer["step"]) == ("final", 5, 7)
    assert "image" not in answer  # numbers in JSON take longer than the picture


@pytest.mark.parametrize(
    ("which", "count"), [({"num_previews": 2}, 2), ({"preview_decoder": "linear"}, 6)]
)
def test_previews_stream_and_are_those_of_the_pipeline(
    server: TritonServer, pipe: FluxPipeline, which: dict[str, Any], count: int
) -> None:
    arguments = {**SMALL, "seed": 1, "num_inference_steps": 6, **which}
    shown: list[tuple[int, list[bytes]]] = []
    pipe(
        "a star",
        callback_on_preview=lambda _, step, images: shown.append((step, pixels(images))),
        **arguments,
    )

    async def events(backend: TritonBackend) -> list[Any]:
        return [event async for event in backend.stream("a star", **arguments)]

    found = run(server, events)
    previews = [(e.step, pixels(e.images)) for e in found if isinstance(e, Preview)]
    steps = [event for event in found if isinstance(event, StepEnd)]
    assert previews == shown
    assert len(previews) == count
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.sigma for event in steps] == sorted((e.sigma for e in steps), reverse=True)
    assert isinstance(found[-1], FluxPipelineOutput)

    lines = post(
        server,
        {"prompt": "a star", "response_format": "b64_json", **arguments},
        "generate_stream",
    ).split("\n\n")
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [(e["event"], e["step"]) for e in told] == [
        *(("preview", step) for step, _ in shown),
        ("final", 6),
    ]
    assert pixels([png(told[0]["b64_json"])]) == shown[0][1]


def test_twenty_clients_of_mixed_sizes_each_get_their_own_picture(
    server: TritonServer, pipe: FluxPipeline
) -> None:
    asked = [
        {"seed": seed, "height": 32 + 16 * (seed % 3), "width": 32 + 32 * (seed % 2)}
        for seed in range(20)
    ]

    async def all_at_once(backend: TritonBackend) -> list[FluxPipelineOutput]:
        return await asyncio.gather(
            *(backend("a ring", num_inference_steps=2, **each) for each in asked)
        )

    for each, found in zip(asked, run(server, all_at_once), strict=True):
        expected = pipe("a ring", num_inference_steps=2, **each)
        assert pixels(found.images) == pixels(expected.images)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"height": 50}, "multiples of 16"),
        ({"priority": "urgent"}, "'high', 'normal', 'low'"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"image_bytes": "bm8gcGljdHVyZQ=="}, "`image_bytes` is not a picture"),
        ({"mask_image_bytes": "x"}, "`mask_image_bytes` is not a picture"),
        ({"response_format": "url"}, "tensor or b64_json"),
        ({"prompt": []}, "prompt"),
        ({"n": 5000}, "1000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_request_that_cannot_be_is_refused_in_words(
    server: TritonServer, fields: dict[str, object], word: str
) -> None:
    code, message = refusal(server, {"prompt": "a ring", **fields})
    assert code == GENERATE
    assert word in message


def test_grpc_raises_the_hosts_errors_again(server: TritonServer) -> None:
    for wrong in ({"height": 50}, {"seed": -1}, {"height": 64.5}, {"image": GRADIENT[0]}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            run(server, lambda backend, wrong=wrong: backend("a ring", **wrong))
    with pytest.raises(UsageError, match="output_type"):
        run(server, lambda backend: backend("a ring", output_type="np"))


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9"):
        asyncio.run(TritonBackend.connect("127.0.0.1:9"))


def test_a_client_knows_the_bundle_without_having_it(
    server: TritonServer, demo_bundle: Path
) -> None:
    async def known(backend: TritonBackend) -> tuple[bool, object, str]:
        return await backend.ready(), backend.manifest, backend.content_hash

    bundle = open_bundle(demo_bundle)
    assert run(server, known) == (True, bundle.manifest, bundle.content_hash)


def test_leaving_a_stream_cancels_within_a_step_and_harms_nobody(
    server: TritonServer, pipe: FluxPipeline
) -> None:
    before = server.fetch_metrics()

    def cancelled() -> float:
        name = 'fluxdeploy_requests_total{outcome="cancelled"}'
        return server.fetch_metrics()[name] - before[name]

    async def work(backend: TritonBackend) -> FluxPipelineOutput:
        other = asyncio.create_task(backend("a cross", seed=2, **SMALL, priority="low"))
        waiting = asyncio.create_task(backend("a heart", **LONG, priority="low"))
        stream = backend.stream("a ring", **LONG)
        async for event in stream:
            if isinstance(event, StepEnd) and event.step == 3:
                break
        await stream.aclose()
        waiting.cancel()
        return await other

    found = run(server, work)
    assert pixels(found.images) == pixels(pipe("a cross", seed=2, **SMALL).images)
    wait_for(lambda: cancelled() == 2)
    after = server.fetch_metrics()
    made = after["fluxdeploy_steps_total"] - before["fluxdeploy_steps_total"]
    assert made < 40
    assert after["fluxdeploy_running"] == after["fluxdeploy_waiting"] == 0


def test_a_timeout_ends_a_request(server: TritonServer) -> None:
    import tritonclient.grpc as grpc

    prompt = grpc.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a ring"], np.object_))
    steps = grpc.InferInput("num_inference_steps", [1], "INT32")
    steps.set_data_from_numpy(np.array([1000], np.int32))
    answers: list[Any] = []
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.append(error))
        client.async_stream_infer("flux", [prompt, steps], timeout=150_000)
        assert wait_for(lambda: bool(answers)) < 3
        client.stop_stream()
    assert "timeout of 0.15 s is over" in str(answers[0])


def test_a_full_queue_refuses_at_once_and_goes_on(server: TritonServer) -> None:
    def waiting() -> float:
        return server.fetch_metrics()["fluxdeploy_waiting"]

    async def work(backend: TritonBackend) -> QueueFullError:
        tasks = [asyncio.create_task(backend("a ring", **LONG)) for _ in range(WAITING + 1)]
        while await asyncio.to_thread(waiting) < WAITING:
            await asyncio.sleep(0.02)
        with pytest.raises(QueueFullError) as caught:
            await backend("a ring", **SMALL)
        code, message = await asyncio.to_thread(refusal, server, {"prompt": "a ring"})
        assert (code, f"{WAITING} calls wait already" in message) == (GENERATE, True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while await asyncio.to_thread(waiting):
            await asyncio.sleep(0.02)
        assert len((await backend("a ring", **SMALL)).images) == 1
        return caught.value

    assert run(server, work).retry_after > 1


def test_a_higher_priority_goes_first(server: TritonServer) -> None:
    ended: list[str] = []

    async def work(backend: TritonBackend) -> None:
        async def draw(priority: str) -> None:
            await backend("a ring", priority=priority, **{**SMALL, "num_inference_steps": 20})
            ended.append(priority)

        running = asyncio.create_task(backend("a ring", priority="low", **LONG))
        await asyncio.sleep(0.1)
        low, normal = asyncio.create_task(draw("low")), asyncio.create_task(draw("normal"))
        await asyncio.sleep(0.02)
        await draw("high")
        await asyncio.gather(low, normal)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run(server, work)
    assert ended == ["high", "normal", "low"]


def test_metrics_count_what_was_done(server: TritonServer) -> None:
    wait_for(lambda: server.fetch_metrics()["fluxdeploy_running"] == 0)
    before = server.fetch_metrics()
    fields = {"prompt": "a yellow heart", "n": 2, **SMALL, "response_format": "b64_json"}
    post(server, fields)
    post(server, fields)
    refusal(server, {**fields, "height": 1})

    def change(name: str) -> float:
        return server.fetch_metrics()[f"fluxdeploy_{name}"] - before[f"fluxdeploy_{name}"]

    wait_for(lambda: change('requests_total{outcome="invalid"}') == 1)
    assert change("pictures_total") == 4
    assert change("steps_total") == 4
    assert change('requests_total{outcome="made"}') == 2
    # Both encoders, once.
    assert change('prompt_cache_total{outcome="miss"}') == 2
    assert change('prompt_cache_total{outcome="hit"}') == 2
    assert change('stage_seconds_total{stage="denoising"}') > 0


def test_the_repositorys_client_draws(
    server: TritonServer, repository: Path, pipe: FluxPipeline, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, repository / "client.py", "a ring", "--url", server.grpc),
            *("--seed", "7", "--steps", "4", "--width", "64", "--height", "48", "--previews", "1"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(done.stdout.split())
    expected = pipe("a ring", seed=7, num_inference_steps=4, width=64, height=48)
    with Image.open(tmp_path / "picture-0.png") as drawn:
        assert pixels([drawn]) == pixels(expected.images)


STAND_IN = """\
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        path = f"{args['model_repository']}/{args['model_version']}/model.onnx/model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        names = [output.name for output in self.session.get_outputs()]
        answers = []
        for request in requests:
            given = {each.name(): each.as_numpy() for each in request.inputs()}
            found = self.session.run(names, given)
            tensors = [pb.Tensor(*each) for each in zip(names, found)]
            answers.append(pb.InferenceResponse(tensors))
        return answers
"""


def test_bls_draws_the_same_with_a_model_for_each_component(
    demo_bundle: Path, pipe: FluxPipeline, tmp_path: Path
) -> None:
    """The server of the tests has no backend for ONNX, so small models in Python stand in."""
    root = tmp_path / "models"
    for model in write_repository(open_bundle(demo_bundle), root, "bls", Settings())[1:]:
        config = root / model / "config.pbtxt"
        text = config.read_text()
        assert 'platform: "onnxruntime_onnx"' in text
        config.write_text(text.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
        (root / model / "1" / "model.py").write_text(STAND_IN)
    arguments = {**SMALL, "seed": 4, "image": GRADIENT, "strength": 0.6, "num_inference_steps": 4}
    with serve(root, tmp_path / "server.log") as server:
        found = run(server, lambda backend: backend("a ring", **arguments))
        assert pixels(found.images) == pixels(pipe("a ring", **arguments).images)


def test_the_images_api_is_a_gateway_before_the_server(
    server: TritonServer, pipe: FluxPipeline, tmp_path: Path
) -> None:
    """`fluxdeploy serve --triton`: the same pictures and refusals."""
    command = [sys.executable, "-m", "fluxdeploy", "serve", "--port", "0", "--triton", server.grpc]
    log = tmp_path / "gateway.log"
    with open(log, "wb") as errors, subprocess.Popen(command, stderr=errors) as gateway:
        try:
            end = time.monotonic() + 60
            while "Serving at " not in log.read_text():
                assert time.monotonic() < end
                time.sleep(0.05)
            url = log.read_text().split("Serving at ")[1].split()[0]
            body = {"prompt": "a red ring", "seed": 3, "size": "64x48", "num_inference_steps": 2}
            status, answer, _ = ask(url, body)
            assert status == 200
            expected = pipe("a red ring", seed=3, **SMALL).images
            found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected[0]))
            status, answer, _ = ask(url, {"prompt": "a", "max_sequence_length": 10**6})
            assert status == 400
            assert "max_sequence_length" in answer["error"]["message"]
        finally:
            gateway.terminate()
        assert gateway.wait(60) == 0
