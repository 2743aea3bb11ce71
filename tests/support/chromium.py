"""A headless Chromium, driven over its DevTools protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Page", "find_chromium", "open_page"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--disable-sync", "--no-default-browser-check", "--hide-scrollbars"),
    *("--disable-dev-shm-usage", "--password-store=basic", "--use-mock-keychain"),
)

_PATIENCE = 20.0
"""Seconds for the browser to answer, and for the page to come to a state."""

_KEYS = {"Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
_SHIFT, _CTRL = 8, 2


def find_chromium() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A page of a browser. What it writes to the console as an error is in `complaints`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []

    def attach(self) -> None:
        """Open a tab, which the other methods speak to."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """What a method of the protocol answers."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._connection.sendall(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._sent:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self._note(reply)

    def _receive(self) -> Any:
        while b"\0" not in self._received:
            more = self._connection.recv(1 << 20)
            assert more, "Chromium has ended"
            self._received += more
        first, self._received = self._received.split(b"\0", 1)
        return json.loads(first)

    def _note(self, event: Mapping[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", details).get("description", "?"))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} ({params['entry'].get('url')})")

    def go(self, url: str) -> None:
        """Open an address, and wait until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({url!r}) && document.readyState == 'complete'")

    def value(self, expression: str) -> Any:
        """The value of JavaScript, whose promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, f"{expression}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of JavaScript once it is true."""
        until = time.monotonic() + _PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < until, f"never came true: {expression}"
            time.sleep(0.01)
        return value

    def press(self, key: str, ctrl: bool = False, shift: bool = False) -> None:
        """Press a key where the focus is."""
        modifiers = _CTRL * ctrl + _SHIFT * shift
        code = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def fill(self, selector: str, text: str) -> None:
        """Type into a field in place of what it has."""
        self.value(f"document.querySelector({selector!r}).select()")
        self.value(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        self.drag(selector, ())

    def drag(self, selector: str, shares: tuple[tuple[float, float], ...]) -> None:
        """Press in the middle of an element, move to shares of its width and height, let go."""
        x, y, width, height = self.value(
            f"(() => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })()"
        )
        spot = {"x": x + width / 2, "y": y + height / 2, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", buttons=1, **spot)
        for across, down in shares:
            spot |= {"x": x + width * across, "y": y + height * down}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", buttons=1, **spot)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **spot)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a field for files."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    def resize(self, width: int, height: int) -> None:
        """Lay the page out for a window of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """Set media features, with underscores for hyphens."""
        named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def screenshot(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def open_page(chromium: str, profile: Path) -> Iterator[Page]:
    """A page of a browser that ends with it. `profile` is a folder for its files."""
    ours, theirs = socket.socketpair()
    ours.settimeout(_PATIENCE)
    flags = [*_FLAGS, f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    # It reads what it is told from descriptor 3 and answers on 4; a socket is good for both.
    descriptors = [
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, theirs.fileno(), 4),
        (os.POSIX_SPAWN_DUP2, 4, 3),
    ]
    process = os.posix_spawn(chromium, [chromium, *flags], os.environ, file_actions=descriptors)
    theirs.close()
    page = Page(ours)
    try:
        page.attach()
        yield page
    finally:
        ours.close()  # at which it ends
        os.waitpid(process, 0)
