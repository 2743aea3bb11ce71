"""The images API, asked by OpenAI's own client and by plain requests."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.turns import QueueLimits
from tests.serve.conftest import LIMIT, Serving, connect

openai = pytest.importorskip("openai")

PROMPT = "a red circle above a blue square"
FAST = {"num_inference_steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT)


def post(url: str, body: Any, path: str = "generations", **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{url}/v1/images/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def get(url: str, path: str) -> bytes:
    with urllib.request.urlopen(f"{url}{path}", timeout=LIMIT) as answer:
        return bytes(answer.read())


def metric(url: str, name: str) -> float:
    lines = get(url, "/metrics").decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def decoded(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def drawn(pipeline: FluxPipeline, **arguments: Any) -> list[Image.Image]:
    images = pipeline(PROMPT, **{**FAST, **arguments}).images
    assert isinstance(images, list)
    return images


def same(image: Image.Image, other: Image.Image) -> bool:
    return bool(np.array_equal(np.asarray(image), np.asarray(other)))


def test_the_openai_client_draws_the_pictures_of_the_host(
    client: Any, pipeline: FluxPipeline
) -> None:
    answer = client.images.generate(
        prompt=PROMPT,
        model="demo",
        n=2,
        size="96x128",
        user="somebody",
        extra_body={**FAST, "guidance_scale": 2.0},
    )
    expected = drawn(pipeline, num_images_per_prompt=2, width=96, height=128, guidance_scale=2.0)
    assert [
        same(decoded(each.b64_json), picture)
        for each, picture in zip(answer.data, expected, strict=True)
    ] == [True, True]
    assert (answer.size, answer.output_format, answer.background) == ("96x128", "png", "opaque")
    echoed = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 2.0, "true_cfg_scale": 1.0}
    assert echoed.items() <= answer.model_extra.items()


def test_the_openai_client_edits_a_picture(client: Any, pipeline: FluxPipeline) -> None:
    given = Image.effect_mandelbrot((150, 90), (-2, -1, 1, 1), 50).convert("RGB")
    file = io.BytesIO()
    given.save(file, "PNG")
    answer = client.images.edit(
        image=("given.png", file.getvalue()),
        prompt=PROMPT,
        size="128x96",
        extra_body={**FAST, "strength": 0.5},
    )
    expected = drawn(pipeline, image=given, width=128, height=96, strength=0.5)
    assert same(decoded(answer.data[0].b64_json), expected[0])
    # Of the picture's own proportions, with as many pixels as the bundle's default.
    assert (
        client.images.edit(
            image=("given.png", file.getvalue()), prompt=PROMPT, extra_body=FAST
        ).size
        == "160x96"
    )


def test_the_openai_client_redraws_what_is_transparent_in_the_mask(
    client: Any, pipeline: FluxPipeline
) -> None:
    given = Image.new("RGB", (128, 128), "white")
    alpha = Image.new("L", given.size, 255)
    alpha.paste(0, (32, 32, 96, 96))
    mask = given.copy()
    mask.putalpha(alpha)
    files = [io.BytesIO(), io.BytesIO()]
    given.save(files[0], "PNG")
    mask.save(files[1], "PNG")
    with client.images.edit(
        image=("given.png", files[0].getvalue()),
        mask=("mask.png", files[1].getvalue()),
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body={**FAST, "strength": 1.0},
    ) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    white = Image.eval(alpha, lambda value: 255 - value)
    expected = drawn(pipeline, image=given, mask_image=white, strength=1.0)
    assert same(decoded(events[-1].b64_json), expected[0])


def test_the_openai_client_streams_three_pictures_of_the_running_state(
    client: Any, pipeline: FluxPipeline
) -> None:
    began = time.perf_counter()
    times, events = [], []
    with client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}
    ) as stream:
        for event in stream:
            times.append(time.perf_counter() - began)
            events.append(event)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    last = decoded(events[-1].b64_json)
    assert same(last, drawn(pipeline, num_inference_steps=28)[0])
    # Each is nearer to the picture than the one before.
    distances = [
        float(np.abs(np.asarray(decoded(event.b64_json), float) - np.asarray(last)).mean())
        for event in events[:3]
    ]
    assert distances == sorted(distances, reverse=True)
    assert 0 < distances[-1] < distances[0] < 80
    assert events[-1].seed == 7


def test_a_stream_of_linear_previews_shows_each_step(client: Any, pipeline: FluxPipeline) -> None:
    shown: list[Any] = []
    drawn(
        pipeline,
        preview_decoder="linear",
        callback_on_preview=lambda _, step, images: shown.append((step, images[0])),
        **FAST,
    )
    body = {"seed": 7, "preview_decoder": "linear", **FAST}
    with client.images.generate(prompt=PROMPT, stream=True, extra_body=body) as stream:
        *partial, _ = stream
    assert [event.step for event in partial] == [step for step, _ in shown] == [1, 2, 3, 4]
    for event, (_, image) in zip(partial, shown, strict=True):
        assert same(decoded(event.b64_json), image)
        assert event.size == f"{image.width}x{image.height}"


def test_a_stream_tells_its_steps_where_they_are_asked_for(url: str) -> None:
    body = {"prompt": PROMPT, "stream": True, "stream_steps": True, **FAST}
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Accept": "text/event-stream"}
    )
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.read().decode().splitlines()
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [each.get("step") for each in data] == [1, 2, 3, 4, None]


@pytest.mark.parametrize(("kind", "mode"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_pictures_come_in_the_format_asked_for(url: str, kind: str, mode: str) -> None:
    body = {"prompt": PROMPT, "output_format": kind, "response_format": "url", **FAST}
    status, answer, _ = post(url, body)
    assert status == 200
    with urllib.request.urlopen(answer["data"][0]["url"], timeout=LIMIT) as file:
        assert file.headers["Content-Type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(file.read())).format == mode


def test_compression_makes_smaller_files(url: str) -> None:
    sizes = []
    for percent in (10, 100):
        body = {"prompt": PROMPT, "output_format": "jpeg", "output_compression": percent, **FAST}
        sizes.append(len(post(url, body)[1]["data"][0]["b64_json"]))
    assert sizes[0] < sizes[1] / 2


REFUSED: list[tuple[Any, str | None, str]] = [
    ({}, "prompt", "The field `prompt` is missing"),
    ({"prompt": ""}, "prompt", "`prompt`"),
    ({"prompt": PROMPT, "sed": 1}, "sed", "The field 'sed' is unknown. The fields are prompt,"),
    ({"prompt": PROMPT, "x" * 5000: 1}, None, "xxx...' is unknown"),
    ({"prompt": PROMPT, "style": "vivid"}, "style", "`style` cannot be had here"),
    ({"prompt": PROMPT, "n": 11}, "n", "`n`"),
    ({"prompt": PROMPT, "n": "2"}, "n", "`n`"),
    ({"prompt": PROMPT, "n": True}, "n", "`n`"),
    ({"prompt": PROMPT, "size": "8192x64"}, "size", "widths go from 16 to 4096"),
    ({"prompt": PROMPT, "size": "100x100"}, "size", "in multiples of 16"),
    ({"prompt": PROMPT, "size": "4096x4096"}, "size", "this server draws 256000"),
    ({"prompt": PROMPT, "size": "1024"}, "size", "`size`"),
    ({"prompt": PROMPT, "num_inference_steps": 401}, "num_inference_steps", "more than the 400"),
    ({"prompt": PROMPT, "quality": "hd"}, "quality", "'auto' or 'standard'"),
    ({"prompt": PROMPT, "background": "transparent"}, "background", "'auto' or 'opaque'"),
    ({"prompt": PROMPT, "seed": -1}, "seed", "`seed`"),
    ({"prompt": PROMPT, "partial_images": 2}, "partial_images", "It needs `stream`: true"),
    ({"prompt": PROMPT, "stream": True, "n": 2}, "n", "leave `n` at 1"),
    ({"prompt": PROMPT, "output_compression": 5}, "output_compression", "PNG keeps every pixel"),
    ({"prompt": PROMPT, "model": "dall-e-3"}, "model", "there is 'demo'"),
    ({"prompt": PROMPT, "max_sequence_length": 10**9}, None, "max_sequence_length"),
    ({"prompt": PROMPT, "priority": "urgent"}, "priority", "'high', 'normal' or 'low'"),
    (b"{", None, "The body is no JSON"),
    (b"[1]", None, "The body must be a JSON object"),
    (b'{"prompt": NaN}', None, "The body is no JSON"),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale", "`guidance_scale`"),
    (b"[" * 100_000, None, "The body is no JSON"),
    ({f"field {number}": 1 for number in range(50_000)}, "field 0", "The field 'field 0' is"),
    ({"prompt": PROMPT, "model": "a" * 300}, "model", "`model`"),
    (b'{"prompt": "\\ud800"}', None, ""),
    (b"\xff", None, "The body is no JSON"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_its_field(
    url: str, body: Any, param: str | None, words: str
) -> None:
    status, answer, _ = post(url, body)
    error = answer["error"]
    assert status == (404 if "there is 'demo'" in words else 400), error
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 1500


def test_the_openai_client_knows_the_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="widths go from 16 to 4096"):
        client.images.generate(prompt=PROMPT, size="5000x16")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="gpt-image-2")
    with pytest.raises(openai.BadRequestError, match="`image` is not a picture that can be read"):
        client.images.edit(image=("a.png", b"no picture"), prompt=PROMPT)


FIELD = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
WHOLE = FIELD.format("prompt", "", "a")
FORMS = [
    (FIELD.format("prompt", "", "a"), "The file `image` is missing"),
    (FIELD.format("image", "", "a"), "`image` must be a file"),
    (FIELD.format("mask", '; filename="m"', "a"), "The file `image` is missing"),
    (FIELD.format("other", '; filename="m"', "a"), "The file 'other' is unknown"),
    (17 * FIELD.format("image", '; filename="m"', "a"), "There are 17 files image"),
    (2 * FIELD.format("prompt", "", "a"), "The field 'prompt' is there twice"),
    (WHOLE + FIELD.format("image[]", '; filename="m"', "a"), "not a picture that can be read"),
    (40 * FIELD.format("image", '; filename="m"', "a"), "The form cannot be read: Too many files"),
    (41 * FIELD.format("prompt", "", "a"), "The form cannot be read: Too many fields"),
    ("nonsense", "The form cannot be read"),
]


@pytest.mark.parametrize(("form", "words"), FORMS)
def test_a_form_that_cannot_be_is_refused(url: str, form: str, words: str) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer, _ = post(url, f"{form}--x--\r\n".encode(), "edits", **kind)
    assert status == 400
    assert words in answer["error"]["message"]


def test_a_client_that_leaves_ends_its_call_within_a_step(url: str) -> None:
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 400}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    cancelled = metric(url, "fluxdeploy_cancelled_total")
    connection = connect(url)
    connection.sendall(head.encode() + body)
    before = metric(url, "fluxdeploy_steps_total")
    until(lambda: metric(url, "fluxdeploy_steps_total") > before)
    connection.close()
    until(lambda: metric(url, "fluxdeploy_running") == 0)
    # On a machine that is busy a few are made until the server hears of it.
    assert metric(url, "fluxdeploy_steps_total") - before < 200
    assert metric(url, "fluxdeploy_cancelled_total") == cancelled + 1


def test_a_full_queue_is_answered_with_when_to_come_again(
    url: str, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline._turns, "_limits", QueueLimits(waiting=1))
    body = {"prompt": PROMPT, "num_inference_steps": 60}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(post, url, body) for _ in range(4)]
        answers = [call.result(LIMIT) for call in calls]
    assert sorted(status for status, _, _ in answers) == [200, 200, 503, 503]
    for status, answer, headers in answers:
        if status == 503:
            assert int(headers["Retry-After"]) >= 1
            assert "wait already" in answer["error"]["message"]
            assert answer["error"]["type"] == "overloaded_error"


def test_twenty_clients_of_mixed_sizes_get_their_own_pictures(
    url: str, pipeline: FluxPipeline
) -> None:
    """Also where calls change places between two steps, on the real engines."""

    def ask(number: int) -> tuple[int, int, Image.Image]:
        side = (64, 96, 128)[number % 3]
        body = {"prompt": PROMPT, "seed": number, "num_inference_steps": 6, "size": f"{side}x64"}
        body["priority"] = ("low", "normal", "high")[number % 3]
        status, answer, _ = post(url, body)
        assert status == 200, answer
        return number, side, decoded(answer["data"][0]["b64_json"])

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    for number, side, picture in answers:
        expected = drawn(pipeline, seed=number, width=side, height=64, num_inference_steps=6)
        assert same(picture, expected[0]), number


def test_repeated_prompts_skip_the_text_encoders(url: str, pipeline: FluxPipeline) -> None:
    ran: list[str] = []
    engines = pipeline._components._engines
    for name in ("clip", "t5"):
        run = engines[name].run
        engines[name].run = lambda inputs, name=name, run=run: ran.append(name) or run(inputs)  # type: ignore[method-assign,misc,func-returns-value]
    try:
        for prompt in ("a new prompt", "a new prompt", "another prompt", "a new prompt"):
            assert post(url, {"prompt": prompt, **FAST})[0] == 200
    finally:
        for name in ("clip", "t5"):
            del engines[name].run
    assert ran == ["clip", "t5"] * 2


def test_keys_are_asked_for_where_there_are_some(
    serving: Serving, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(keys=("first-key", "second-key")) as url:
        for key in (None, "Bearer wrong", "Bearer ", "Basic first-key", "Bearer first-key second"):
            headers = {} if key is None else {"Authorization": key}
            status, answer, got = post(url, {"prompt": PROMPT, **FAST}, **headers)
            assert (status, got["WWW-Authenticate"]) == (401, "Bearer")
            assert "API key" in answer["error"]["message"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="second-key", max_retries=0)
        assert client.images.generate(prompt=PROMPT, extra_body=FAST).data
        assert [model.id for model in client.models.list()] == ["demo"]
        assert get(url, "/health") == b'{"status":"ok"}'
        assert b"wrong" not in get(url, "/metrics")
    written = "".join(capfd.readouterr())
    assert "key" not in written


def test_bodies_are_bounded(serving: Serving) -> None:
    with serving(max_body=1000) as url:
        status, answer, _ = post(url, {"prompt": "a" * 2000})
        assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
        connection = connect(url)
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(b"800\r\n" + b"a" * 0x800 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"
        connection.close()


def test_pages_of_other_origins_are_let_in_only_where_they_are_named(
    url: str, serving: Serving
) -> None:
    def allowed(address: str) -> str | None:
        request = urllib.request.Request(f"{address}/health", headers={"Origin": "https://a.org"})
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            found: str | None = answer.headers["Access-Control-Allow-Origin"]
            return found

    assert allowed(url) is None
    with serving(origins=("https://a.org",)) as other:
        assert allowed(other) == "https://a.org"


def test_the_model_tells_its_limits(url: str) -> None:
    model = json.loads(get(url, "/v1/models/demo"))
    assert model["limits"]["width"] == {"min": 16, "max": 4096, "default": 128}
    assert model["limits"]["tasks"] == ["generations", "edits"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(url, "/v1/models/other")


def test_files_that_were_not_made_are_not_there(url: str) -> None:
    for path in ("/v1/images/files/x", "/v1/images/files/..%2f..%2fetc%2fpasswd", "/%2e%2e/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url, path)


def test_the_server_is_ready_and_counts(url: str) -> None:
    assert json.loads(get(url, "/ready")) == {"status": "ready"}
    before = metric(url, "fluxdeploy_pictures_total")
    post(url, {"prompt": PROMPT, "n": 3, **FAST})
    assert metric(url, "fluxdeploy_pictures_total") == before + 3
    assert metric(url, "fluxdeploy_stage_seconds_count") > 0


def until(condition: Any) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)
