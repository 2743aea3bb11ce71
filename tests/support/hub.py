"""A model hub on this machine: the few answers of its web interface that a download asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` of every repository named `acme/...`, at `COMMIT`, `main` and `v1`.

    asked: the files whose bytes were asked for, without those that only their headers were.
    status: what is answered instead of a listing or a file, with the hub's code of the error.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.status: Callable[[str], tuple[int, str] | None] = lambda path: None

    def answer(self, path: str, ranged: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of what is at a path."""
        if (refused := self.status(path)) is not None:
            return refused[0], {"X-Error-Code": refused[1]}, b""
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "api":
            _, _, _, what, *revision = rest.split("/")
            if revision and revision[0] not in (COMMIT, "main", "v1"):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            listing = self._tree() if what == "tree" else self._info()
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        name = rest.split("/", 3)[3] if rest.count("/") > 2 else ""
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = self.files[name]
        if not ranged:
            self.asked.append(name)
        etag = hashlib.sha1(body).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in self.files.items()
        ]

    def _info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.files]
        return {"id": "acme/x", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a hub; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            ranged = "Range" in self.headers or self.command == "HEAD"
            status, headers, body = hub.answer(self.path.split("?")[0], ranged)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
