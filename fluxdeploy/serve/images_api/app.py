"""The routes of the server."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from fluxdeploy import __version__
from fluxdeploy.serve.images_api.bodies import EditBody, GenerationBody, read_fields, read_json
from fluxdeploy.serve.images_api.calls import (
    Backend,
    Gone,
    described,
    drawn,
    finish,
    stream_events,
)
from fluxdeploy.serve.images_api.drawing import Drawing, limits_of, model_name, read_drawing
from fluxdeploy.serve.images_api.errors import ApiError
from fluxdeploy.serve.images_api.kept import KeptPictures
from fluxdeploy.serve.images_api.metrics import CountedRequests, Metrics
from fluxdeploy.serve.images_api.replies import MEDIA_TYPES
from fluxdeploy.serve.images_api.schema import EDIT, GENERATION, RESPONSES
from fluxdeploy.serve.images_api.settings import Settings
from fluxdeploy.serve.images_api.uploads import (
    Files,
    LimitedBodies,
    read_body,
    read_files,
    read_form,
)
from fluxdeploy.serve.picture_files import as_base64

__all__ = ["create_app"]

_PAGE = {
    "": "text/html",
    "page.css": "text/css",
    **dict.fromkeys(("page.js", "stream.js", "painter.js", "history.js"), "text/javascript"),
}

_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; script-src 'self'; "
    "style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """The application over a backend, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.aclose()

    # The pages of FastAPI's own load scripts from elsewhere.
    app = FastAPI(
        title="fluxdeploy",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    server = _Server(backend, settings)
    guarded: dict[str, Any] = {"dependencies": [Depends(server.check_key)], "responses": RESPONSES}
    app.post("/v1/images/generations", openapi_extra=GENERATION, **guarded)(server.generations)
    if "edits" in server.limits["tasks"]:
        app.post("/v1/images/edits", openapi_extra=EDIT, **guarded)(server.edits)
    app.get("/v1/images/files/{name}", responses={404: RESPONSES[404]}, response_class=Response)(
        server.files
    )
    app.get("/v1/models", **guarded)(server.models)
    app.get("/v1/models/{model:path}", **guarded)(server.model)
    app.get("/health")(server.health)
    app.get("/ready")(server.ready)
    app.get("/metrics", response_class=Response)(server.metrics_text)
    app.get("/", include_in_schema=False)(server.page)
    app.get("/{name}", include_in_schema=False)(server.page)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Gone, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(CountedRequests, metrics=server.metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(LimitedBodies, max_body=settings.max_body)
    return app


class _Server:
    """The handlers of the routes."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._kept = KeptPictures(settings.kept_bytes, settings.kept_seconds)
        self.metrics = Metrics()
        for name, (text, _) in backend.figures().items():
            self.metrics.watch(name, text, functools.partial(_figure, backend, name))
        self.limits = limits_of(backend.manifest, settings)
        self._name = model_name(backend.manifest, settings)

    async def check_key(self, request: Request) -> None:
        """Refuse a request without a key, where keys are asked for."""
        if not self._settings.keys:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self._settings.knows(key.strip()):
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def generations(self, request: Request) -> Response:
        """Draw pictures of a prompt."""
        body = read_json(GenerationBody, await read_body(request))
        drawing = read_drawing(body, self._backend.manifest, self._settings)
        return await self._answer(request, drawing, "image_generation")

    async def edits(self, request: Request) -> Response:
        """Draw pictures from pictures: all of one, what a mask shows, or along another one."""
        form = await read_form(request)
        try:
            fields, files = await read_files(form)
        finally:
            await form.close()
        body = read_fields(EditBody, fields)
        # Beside the loop, which serves others meanwhile.
        drawing = await asyncio.to_thread(self._edit, body, files)
        return await self._answer(request, drawing, "image_edit")

    def _edit(self, body: EditBody, files: Files) -> Drawing:
        return read_drawing(body, self._backend.manifest, self._settings, files.decoded())

    async def _answer(self, request: Request, drawing: Drawing, kind: str) -> Response:
        if drawing.body.stream:
            events = await stream_events(self._backend, drawing, self.metrics, kind)
            # Proxies would keep the events until there are many.
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        output = await drawn(request, self._backend, drawing, self.metrics)
        data = []
        for image in output.images:
            file = await finish(drawing, image)
            if drawing.body.response_format == "url":
                name = self._kept.keep(file, MEDIA_TYPES[drawing.body.output_format])
                data.append({"url": str(request.url_for("files", name=name))})
            else:
                data.append({"b64_json": as_base64(file)})
        reply = {"created": drawing.created, "data": data, **described(drawing)}
        reply |= {"seed": output.seed, **drawing.echo, "notices": list(output.notices)}
        return JSONResponse(reply)

    async def files(self, name: str) -> Response:
        """A picture that was answered by its URL."""
        picture = self._kept.get(name)
        if picture is None:
            raise ApiError(404, "There is no picture of that name, or it was kept long enough.")
        return Response(picture.data, media_type=picture.media_type)

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model that is served, by its name."""
        if model != self._name:
            raise ApiError(404, f"There is no such model here; there is {self._name!r}.")
        return self._model()

    def _model(self) -> dict[str, Any]:
        model = {"id": self._name, "object": "model", "created": 0}
        return {**model, "owned_by": "fluxdeploy", "limits": self.limits}

    async def health(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Whether calls are taken."""
        ready = await self._backend.ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics_text(self) -> Response:
        """What Prometheus reads."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, name: str = "") -> Response:
        """The page that tries the server, and its parts."""
        if name not in _PAGE:
            raise HTTPException(404)
        file = resources.files("fluxdeploy.serve.images_api") / "page" / (name or "index.html")
        headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(file.read_bytes(), media_type=_PAGE[name], headers=headers)


def _figure(backend: Backend, name: str) -> float:
    return backend.figures()[name][1]


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is nothing at this path.", 405: "This path takes another method."}
    answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    answer = ApiError(500, f"This is a bug in fluxdeploy ({type(error).__name__}).")
    return JSONResponse(answer.body(), answer.status)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
