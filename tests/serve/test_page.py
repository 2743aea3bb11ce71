"""The page at /, driven in a headless Chromium as people use it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fluxdeploy.host.pipeline import FluxPipeline
from tests.support.chromium import Page, find_chromium, open_page

uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")

PREVIEW = "document.querySelector('#picture').alt == 'The picture as it is so far'"
IDLE = "document.querySelector('#cancel').hidden"
DRAWN = "document.querySelectorAll('#history li').length == {}"
IMAGE_COLOR = (30, 90, 200)
ERROR = "document.querySelector('#error').textContent"


@dataclass(frozen=True)
class Served:
    """The addresses of a server that asks for a key and of one that does not; one pipeline."""

    pipeline: FluxPipeline
    url: str
    guarded_url: str


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application at an address of this machine. Its backend is not its own to close."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(demo_bundle: Path) -> Iterator[Served]:
    from fluxdeploy.serve.images_api.app import create_app
    from fluxdeploy.serve.images_api.server import local_backend
    from fluxdeploy.serve.images_api.settings import Settings

    with FluxPipeline.from_bundle(demo_bundle) as pipeline, ExitStack() as stack:
        backend = local_backend(pipeline)
        plain = create_app(backend, Settings("demo"))
        guarded = create_app(backend, Settings("demo", keys=("open-sesame",)))
        addresses = [stack.enter_context(serving(app)) for app in (plain, guarded)]
        yield Served(pipeline, *addresses)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_page(CHROMIUM, tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page, served: Served) -> Iterator[Page]:
    """The page as it is opened for the first time. At the end the browser has no complaint."""
    origin = served.url.rstrip("/")
    browser.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
    browser.resize(1280, 900)
    browser.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    open_at(browser, served.url)
    yield browser
    # Answers of the server that refuse something are told by the browser too.
    assert [each for each in browser.complaints if "the server responded" not in each] == []
    browser.complaints.clear()


def open_at(page: Page, url: str) -> None:
    page.go("about:blank")
    page.go(url)
    page.wait("document.querySelector('#model').textContent == 'demo'")


def shown_pixels(page: Page) -> NDArray[np.uint8]:
    """What the picture has: uint8 [H, W, 3]."""
    url = page.value(
        "(async () => { const p = document.querySelector('#picture'); await p.decode();"
        "const c = document.createElement('canvas');"
        "c.width = p.naturalWidth; c.height = p.naturalHeight;"
        "c.getContext('2d').drawImage(p, 0, 0); return c.toDataURL() })()"
    )
    return pixels(base64.b64decode(url.partition(",")[2]))


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def field(page: Page, name: str) -> Any:
    return page.value(f"document.querySelector('#{name}').value")


def draw(page: Page, prompt: str, drawings: int = 1, **fields: str) -> None:
    """Draw, until there are so many drawings in the history."""
    for name, text in {"prompt": prompt, **fields}.items():
        page.fill(f"#{name}", text)
    page.press("Enter", ctrl=True)
    page.wait(f"({DRAWN.format(drawings)} && {IDLE}) || {ERROR}")
    assert page.value(ERROR) == ""


def test_a_picture_is_watched_as_it_becomes_clear_and_is_that_of_its_seed(
    page: Page, served: Served
) -> None:
    page.fill("#num_inference_steps", "30")
    page.fill("#prompt", "a red circle above a blue square")
    page.press("Enter", ctrl=True)
    page.wait(PREVIEW)
    step = page.value("document.querySelector('#progress').value")
    assert 6 <= step < 30
    assert page.value("document.querySelector('#progress-text').textContent").endswith(" of 30")
    assert "Preview" in page.value("document.querySelector('#announcer').textContent")
    page.wait(f"{IDLE} && {DRAWN.format(1)}")
    seed = int(field(page, "seed"))
    told = served.pipeline("a red circle above a blue square", seed=seed, num_inference_steps=30)
    np.testing.assert_array_equal(shown_pixels(page), np.asarray(told.images[0]))
    assert f"seed {seed}" in page.value("document.querySelector('#caption-parameters').textContent")
    assert page.value("document.querySelector('#download').download") == f"fluxdeploy-{seed}.png"


@pytest.mark.parametrize("way", ["key", "button"])
def test_cancelling_ends_the_call_on_the_server(page: Page, served: Served, way: str) -> None:
    page.fill("#num_inference_steps", "200")
    page.fill("#prompt", "a purple square")
    page.click("#draw")
    page.wait("document.querySelector('#progress').value > 0")
    assert served.pipeline.stats.running == 1
    if way == "key":
        page.press("Escape")
    else:
        page.click("#cancel")
    page.wait(IDLE)
    assert page.value("document.querySelector('#announcer').textContent") == "Cancelled."
    assert page.value(DRAWN.format(0))
    until = time.monotonic() + 1
    while served.pipeline.stats.running and time.monotonic() < until:
        time.sleep(0.01)
    assert served.pipeline.stats.running == 0


def test_the_history_outlives_the_page_brings_parameters_back_and_forgets(
    page: Page, served: Served
) -> None:
    chosen = {"seed": "7", "num_inference_steps": "6", "width": "96", "guidance_scale": "2"}
    chosen |= {"negative_prompt": "blue", "true_cfg_scale": "1.5"}
    draw(page, "a green triangle", **chosen)
    drawn = shown_pixels(page)
    page.fill("#negative_prompt", "")
    draw(page, "a yellow circle", 2, seed="8", num_inference_steps="2")
    open_at(page, served.url)
    page.wait(DRAWN.format(2))
    page.click("#history li:last-child .thumbnail")
    page.wait("document.querySelector('#prompt').value == 'a green triangle'")
    assert {name: field(page, name) for name in chosen} == chosen
    assert field(page, "height") == "128"
    assert not page.value("document.querySelector('#random').checked")
    np.testing.assert_array_equal(shown_pixels(page), drawn)
    page.click("#history li:first-child .delete")
    open_at(page, served.url)
    page.wait(DRAWN.format(1))
    assert page.value("document.querySelector('#history img').alt") == "a green triangle"


def test_same_again_draws_with_the_seed_of_the_picture_that_is_shown(page: Page) -> None:
    draw(page, "a purple square", num_inference_steps="2")
    seed = field(page, "seed")
    draw(page, "a purple square", 2)
    assert field(page, "seed") != seed
    page.click("#history li:last-child .thumbnail")
    page.click("#random")
    page.click("#again")
    draw(page, "a purple square", 3)
    assert field(page, "seed") == seed


def test_what_the_server_refuses_is_told_in_its_words_and_at_the_field(page: Page) -> None:
    page.fill("#prompt", "a purple square")
    page.fill("#width", "100")
    page.press("Enter", ctrl=True)
    told = page.wait(ERROR)
    assert told.startswith("The size 100x128 is out of range: widths go from 16 to ")
    assert page.value("document.querySelector('#width').ariaInvalid") == "true"
    page.fill("#width", "112")
    assert page.value("document.querySelector('#error').hidden")
    assert page.value("document.querySelector('#width').ariaInvalid") is None


def test_sizes_are_offered_that_the_bundle_draws(page: Page) -> None:
    page.click("#presets button:nth-child(4)")
    assert (field(page, "width"), field(page, "height")) == ("176", "96")
    page.click("#swap")
    assert (field(page, "width"), field(page, "height")) == ("96", "176")
    assert (
        page.value("document.querySelector('#presets [aria-pressed=true]').textContent") == "9:16"
    )


def test_a_picture_is_drawn_from_an_image_in_its_proportions(
    page: Page, served: Served, tmp_path: Path
) -> None:
    file = choose_image(page, tmp_path, 200, 100)
    assert (field(page, "width"), field(page, "height")) == ("176", "96")
    draw(page, "a red circle", seed="3", num_inference_steps="6")
    with Image.open(file) as image:
        arguments: dict[str, Any] = {"image": image, "strength": 0.6, "width": 176, "height": 96}
        told = served.pipeline("a red circle", seed=3, num_inference_steps=6, **arguments)
    np.testing.assert_array_equal(shown_pixels(page), np.asarray(told.images[0]))


def paint_and_draw(page: Page, folder: Path) -> Image.Image:
    """Draw from an image with a painted spot; the mask that was sent."""
    choose_image(page, folder, 200, 100)
    page.fill("#num_inference_steps", "6")
    page.fill("#prompt", "a red circle")
    page.value("{ const send = fetch; window.fetch = (...all) => send(...(window.sent = all)); }")
    page.drag("#mask", ((0.6, 0.5), (0.7, 0.5)))
    page.press("Enter", ctrl=True)
    page.wait(f"window.sent && {IDLE}")
    url = page.value(
        "new Promise((resolve) => { const reader = new FileReader();"
        "reader.onload = () => resolve(reader.result);"
        "reader.readAsDataURL(window.sent[1].body.get('mask')) })"
    )
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_what_is_painted_is_transparent_in_the_mask_that_is_sent(
    page: Page, tmp_path: Path
) -> None:
    alpha = paint_and_draw(page, tmp_path).getchannel("A")
    assert alpha.size == (200, 100)
    spots = [(100, 50), (140, 50), (20, 50), (100, 90)]
    assert [alpha.getpixel(spot) for spot in spots] == [0, 0, 255, 255]


def test_a_picture_is_redrawn_where_the_mask_is_painted_and_again_from_the_history(
    page: Page, served: Served, tmp_path: Path
) -> None:
    mask = paint_and_draw(page, tmp_path)
    refused = page.value(ERROR)
    if "mask" in refused:
        pytest.skip(f"the server does not redraw what a mask shows: {refused}")
    assert refused == ""
    arguments: dict[str, Any] = {"seed": int(field(page, "seed")), "num_inference_steps": 6}
    arguments |= {"width": 176, "height": 96, "strength": 0.6, "mask_image": mask}
    image = Image.new("RGB", (200, 100), IMAGE_COLOR)
    told = served.pipeline("a red circle", image=image, **arguments)
    np.testing.assert_array_equal(shown_pixels(page), np.asarray(told.images[0]))
    page.click("#remove")
    page.click("#history .thumbnail")
    page.wait("!document.querySelector('#edit').hidden")
    page.press("Enter", ctrl=True)
    page.wait(f"{IDLE} && {DRAWN.format(2)}")
    np.testing.assert_array_equal(shown_pixels(page), np.asarray(told.images[0]))


def test_a_control_bundle_draws_along_the_image_and_takes_no_mask(
    browser: Page, bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    from fluxdeploy.serve.images_api.app import create_app
    from fluxdeploy.serve.images_api.server import local_backend
    from fluxdeploy.serve.images_api.settings import Settings

    with (
        FluxPipeline.from_bundle(bundle("control")) as pipeline,
        serving(create_app(local_backend(pipeline), Settings("demo"))) as url,
    ):
        open_at(browser, url)
        choose_image(browser, tmp_path, 100, 100)
        for hidden in ("#mask", "#mask-hint", "#undo", "#strength"):
            assert browser.value(f"document.querySelector('{hidden}').offsetParent === null")
        for name, value in {"width": 64, "height": 48, "num_inference_steps": 2}.items():
            browser.fill(f"#{name}", str(value))
        browser.fill("#prompt", "a fox")
        browser.press("Enter", ctrl=True)
        browser.wait(f"{IDLE} && ({DRAWN.format(1)} || {ERROR} != '')")
        assert browser.value(ERROR) == ""
        seed = int(field(browser, "seed"))
        image = Image.new("RGB", (100, 100), IMAGE_COLOR)
        sizes = {"width": 64, "height": 48, "num_inference_steps": 2}
        told = pipeline("a fox", control_image=image, seed=seed, **sizes)
        np.testing.assert_array_equal(shown_pixels(browser), np.asarray(told.images[0]))
    browser.complaints.clear()


def choose_image(page: Page, folder: Path, width: int, height: int) -> Path:
    """Give the page an image of one colour."""
    file = folder / "image.png"
    Image.new("RGB", (width, height), IMAGE_COLOR).save(file)
    page.choose("#image", file)
    page.wait("!document.querySelector('#edit').hidden")
    return file


def test_a_mask_is_painted_with_the_keyboard(page: Page, tmp_path: Path) -> None:
    choose_image(page, tmp_path, 100, 100)
    alpha = (
        "[...document.querySelector('#mask').getContext('2d').getImageData(0, 50, 100, 1).data]"
        ".filter((value, place) => place % 4 == 3 && value == 255).length"
    )
    page.value("document.querySelector('#mask').focus()")
    assert page.value(alpha) == 0
    page.press(" ")
    dot = page.value(alpha)
    page.press("ArrowRight")
    page.press("ArrowRight", shift=True)
    assert page.value(alpha) > dot > 0
    page.click("#undo")
    assert page.value(alpha) == dot


def test_a_key_is_asked_for_where_the_server_wants_one(page: Page, served: Served) -> None:
    page.go(served.guarded_url)
    page.wait("!document.querySelector('#key-section').hidden")
    assert "API key is missing or wrong" in page.value(ERROR)
    page.fill("#key", "open-sesame")
    page.press("Enter")
    page.wait("document.querySelector('#model').textContent == 'demo'")
    assert page.value("document.querySelector('#key-section').hidden")
    draw(page, "a purple square", num_inference_steps="2")
    assert page.value("JSON.stringify(localStorage)") == "{}"


@pytest.mark.filterwarnings("ignore:The prompt is cut")
def test_a_phone_shows_everything_in_its_width(page: Page, tmp_path: Path) -> None:
    page.resize(320, 640)
    choose_image(page, tmp_path, 100, 160)
    draw(page, "a" * 300, num_inference_steps="5")
    assert page.value("document.documentElement.scrollWidth") == 320
    beyond = (
        "[...document.querySelectorAll('button, input:not(.unseen), textarea, a, img')]"
        ".filter((each) => each.checkVisibility()).map((each) => each.getBoundingClientRect())"
        ".filter(({left, right}) => left < 0 || right > 320).length"
    )
    assert page.value(beyond) == 0
    button = page.value("document.querySelector('#draw').getBoundingClientRect().bottom")
    assert button <= 640


CONTRASTS = """
(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3).map((each) => each / 255)
    .map((each) => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, place) => sum + each * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
  };
  const own = (element) => [...element.childNodes].some((each) => each.nodeType == 3
    && each.data.trim()) || element.matches('input, textarea');
  return [...document.body.querySelectorAll('*')]
    .filter((each) => own(each) && each.checkVisibility() && !each.disabled)
    .map((each) => {
      const [a, b] = [light(getComputedStyle(each).color), light(behind(each))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), each.outerHTML.slice(0, 80)];
    });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_in_dark(page: Page, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    draw(page, "a purple square", num_inference_steps="2")
    page.fill("#num_inference_steps", "1000")
    page.press("Enter", ctrl=True)
    page.wait(ERROR)
    found = page.value(CONTRASTS)
    assert len(found) > 30
    assert [each for each in found if each[0] < 4.5] == []
    brightness = pixels(page.screenshot())[10, -10].mean()
    assert brightness > 200 if scheme == "light" else brightness < 50


def test_nothing_moves_for_those_who_want_less_motion(page: Page) -> None:
    moving = (
        "(() => { const stage = document.querySelector('#stage');"
        "stage.setAttribute('aria-busy', 'true'); const count = document.getAnimations().length;"
        "stage.removeAttribute('aria-busy'); return count })()"
    )
    assert page.value(moving) == 0
    page.prefer(prefers_reduced_motion="no-preference")
    assert page.value(moving) > 0


def test_the_keyboard_reaches_every_control_in_order_and_each_has_a_name(page: Page) -> None:
    draw(page, "a purple square", num_inference_steps="2")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if any(each["name"] == "focusable" for each in node.get("properties", ()))
        and node["role"]["value"] != "RootWebArea"
    ]
    assert len(focusable) > 20
    assert [node["role"] for node in focusable if not node.get("name", {}).get("value")] == []
    page.value("document.querySelector('#prompt').focus()")
    reached = []
    while (name := page.value("document.activeElement.id")) != "draw":
        reached.append(name)
        page.press("Tab")
        assert len(reached) < 40
    expected = ["prompt", "negative_prompt", "true_cfg_scale", "width", "swap", "height"]
    expected += ["num_inference_steps", "guidance_scale", "random", "seed", "again", "image"]
    assert [name for name in reached if name] == expected


def test_the_parts_of_the_page_are_served_and_packaged() -> None:
    from importlib import resources

    from fluxdeploy.serve.images_api.app import _PAGE

    parts = {
        each.name for each in (resources.files("fluxdeploy.serve.images_api") / "page").iterdir()
    }
    assert parts == {name or "index.html" for name in _PAGE}
