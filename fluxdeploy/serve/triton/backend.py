"""A Triton server's model `flux` as an asynchronous pipeline, for a gateway before it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from engines.base import Array
from fluxdeploy.arguments import shown
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.bundle.manifest_json import from_json
from fluxdeploy.errors import (
    Cancelled,
    EngineError,
    FluxDeployError,
    MissingDependencyError,
    QueueFullError,
    UsageError,
)
from fluxdeploy.host.asynchronous import Preview, StepEnd
from fluxdeploy.host.input_images import upright_mask, upright_picture
from fluxdeploy.host.pipeline import FluxPipelineOutput
from fluxdeploy.install import install_command
from fluxdeploy.serve.picture_files import encode
from fluxdeploy.serve.triton.fields import INPUTS, MODEL, STAGES, Field

__all__ = ["TritonBackend"]

_FIELDS = {field.argument: field for field in INPUTS if field.argument is not None}

_OUTPUTS = ("image", "seeds", "event", "step", "sigma", "seconds")

_DTYPES: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "FP32": np.float32,
    "FP64": np.float64,
    "INT32": np.int32,
    "STRING": np.object_,
    "UINT64": np.uint64,
    "UINT8": np.uint8,
}

_AHEAD = re.compile(r"About ([0-9.]+) s of work are ahead")
"""What the model says of a full queue, see `Calls`."""

# A stream's errors have no code otherwise.
_HEADERS = {"triton_grpc_error": "true"}


class TritonBackend:
    """As `AsyncFluxPipeline`, but that the pictures are made by a Triton server.

    An asynchronous context manager. Leaving an iterator, or cancelling the task that waits, cancels
    the request on the server, within a step.
    """

    def __init__(self, client: Any, manifest: Manifest, content_hash: str) -> None:
        """Use `connect`."""
        self._client = client
        self._manifest = manifest
        self._content_hash = content_hash

    @classmethod
    async def connect(cls, address: str) -> TritonBackend:
        """The server at `address`, HOST:PORT of its gRPC service, once its model is loaded.

        Raises `EngineError` where no server answers or it has no such model, `BundleError` where
        its manifest is of another version, and `MissingDependencyError`.
        """
        grpc = _tritonclient()
        try:
            client = grpc.InferenceServerClient(address)
        except Exception as error:
            raise EngineError(f"{address} is no HOST:PORT of a Triton server: {error}.") from error
        try:
            answer = await client.get_model_config(MODEL, client_timeout=10)
        except Exception as error:  # the client's own, and gRPC's
            with suppress(Exception):
                await client.close()
            raise EngineError(
                f"The Triton server at {address} does not serve `{MODEL}`: {error}. Start it on a "
                "repository of `fluxdeploy triton`, and give the port of gRPC, which is 8001."
            ) from error
        given = {key: each.string_value for key, each in answer.config.parameters.items()}
        if "manifest" not in given:
            await client.close()
            raise EngineError(
                f"The model `{MODEL}` at {address} is none of `fluxdeploy triton`: its "
                "configuration has no manifest."
            )
        manifest = from_json(given["manifest"], f"The manifest of {address}")
        return cls(client, manifest, given.get("bundle_hash", ""))

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle that the server runs."""
        return self._manifest

    @property
    def content_hash(self) -> str:
        """The hash that names that bundle."""
        return self._content_hash

    async def ready(self) -> bool:
        """Whether the server answers, and its model takes requests."""
        try:
            return bool(await self._client.is_model_ready(MODEL, client_timeout=2))
        except Exception:  # noqa: BLE001 - whatever it is, it is not ready
            return False

    async def __call__(self, prompt: str | list[str], **arguments: Any) -> FluxPipelineOutput:
        """What `FluxPipeline.__call__` makes of these arguments; see `stream`."""
        output: FluxPipelineOutput | None = None
        async for event in self._events(prompt, arguments, step_events=False):
            if isinstance(event, FluxPipelineOutput):
                output = event
        assert output is not None  # or it has raised
        return output

    async def stream(
        self, prompt: str | list[str], **arguments: Any
    ) -> AsyncIterator[StepEnd | Preview | FluxPipelineOutput]:
        """The steps of a call as they are made, `num_previews` pictures between, and its output.

        The arguments are those of `FluxPipeline.__call__` without callbacks, `cancel` and
        `output_type`: the images are PIL's. Raises what it raises, and `EngineError` where the
        server does not answer.
        """
        events = self._events(prompt, arguments, step_events=True)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def _events(
        self, prompt: str | list[str], arguments: Mapping[str, Any], step_events: bool
    ) -> Any:
        grpc = _tritonclient()
        # Pictures are made files of, beside the loop.
        tensors = await asyncio.to_thread(lambda: list(_tensors({"prompt": prompt, **arguments})))
        inputs = [_input(grpc, *each) for each in tensors]
        inputs.append(_input(grpc, "step_events", "BOOL", np.array([step_events])))
        request = {
            "model_name": MODEL,
            "inputs": inputs,
            "outputs": [grpc.InferRequestedOutput(name) for name in _OUTPUTS],
        }

        ended = asyncio.Event()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield request
            # Triton 24.10 keeps a model for ever that it cancels after a stream's last request.
            await ended.wait()

        answers = self._client.stream_infer(requests(), headers=_HEADERS)
        whole = False
        try:
            async for result, error in answers:
                if error is not None:
                    raise _failure(str(error))
                if whole:
                    continue
                event = _event(result)
                if isinstance(event, FluxPipelineOutput):
                    whole = True
                    ended.set()
                yield event
            if not whole:
                raise EngineError("The Triton server has ended a request without a picture.")
        except FluxDeployError:
            raise
        except Exception as error:
            raise _failure(_details(error), _code(error)) from error
        finally:
            # An ended stream must not be cancelled either.
            if not whole:
                answers.cancel()
            ended.set()

    def figures(self) -> Mapping[str, tuple[str, float]]:
        """Nothing: the server has metrics of its own."""
        return {}

    async def aclose(self) -> None:
        """Leave the server, which goes on."""
        await self._client.close()

    async def __aenter__(self) -> TritonBackend:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _tritonclient() -> Any:
    try:
        import tritonclient.grpc.aio as grpc
    except ImportError as error:
        raise MissingDependencyError(
            f"A Triton server needs the package tritonclient. Install it with "
            f"`{install_command('serve')}`."
        ) from error
    return grpc


def _tensors(arguments: Mapping[str, Any]) -> list[tuple[str, str, Array]]:
    """The arguments of a call as name, type and values of tensors. Raises `UsageError`."""
    tensors = []
    for name, value in arguments.items():
        if name not in _FIELDS:
            raise UsageError(f"A Triton server takes no `{name}`. Leave it out.")
        if value is None:
            continue
        field = _FIELDS[name]
        if field.dtype == "UINT8":
            value = _only(value)
        if name == "control_mode" and isinstance(value, (list, tuple)):
            value = [-1 if mode is None else mode for mode in value]
        if field.dtype == "UINT8" and isinstance(value, Image.Image):
            tensors.append((f"{field.name}_bytes", "STRING", _files(name, [value])))
        elif name == "control_image" and isinstance(value, (list, tuple)):
            tensors.append((f"{field.name}_bytes", "STRING", _files(name, value)))
        else:
            tensors.append((field.name, field.dtype, _values(name, field, value)))
    return tensors


def _only(value: Any) -> Any:
    """The picture in a list of one, or in a list of one list of one."""
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value


def _files(name: str, pictures: Sequence[Any]) -> Array:
    """A PNG of each, which is without loss; [n]."""
    upright = upright_mask if name == "mask_image" else upright_picture
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise UsageError(
                f"`{name}` has {shown(picture)} in it. A request to Triton holds PIL images there."
            )
    return np.array([encode(upright(picture)) for picture in pictures], np.object_)


def _values(name: str, field: Field, value: Any) -> Array:
    if field.dtype == "UINT8":
        return _pixels(name, field, value)
    try:
        if field.dtype == "STRING":
            texts = [value] if isinstance(value, str) else list(value)
            return np.array([text.encode("utf-8") for text in texts], np.object_)
        values = np.array(value, _DTYPES[field.dtype])
        # What a type cannot hold is another number, and not an error, with older NumPys.
        same = field.dtype == "FP32" or np.array_equal(values, np.array(value))
    except (AttributeError, OverflowError, TypeError, ValueError, UnicodeError):
        same = False
    if not same:
        raise UsageError(f"`{name}` is {shown(value)}, which a request to Triton cannot hold.")
    single = field.dims in ((1,), (-1,)) and values.size == 1
    return values.reshape(1) if single else values


def _pixels(name: str, field: Field, value: Any) -> Array:
    """A picture as uint8 [H, W, 3], or [H, W] of a mask."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == len(field.dims):
        return value
    shape = "[H, W, 3]" if len(field.dims) == 3 else "[H, W]"
    raise UsageError(
        f"`{name}` is {shown(value)}. A request to Triton holds one picture: a PIL image, or an "
        f"array {shape} of uint8."
    )


def _input(grpc: Any, name: str, dtype: str, values: Array) -> Any:
    tensor = grpc.InferInput(name, list(values.shape), "BYTES" if dtype == "STRING" else dtype)
    tensor.set_data_from_numpy(values)
    return tensor


def _event(result: Any) -> StepEnd | Preview | FluxPipelineOutput:
    kind = result.as_numpy("event")[0].decode()
    step = int(result.as_numpy("step")[0])
    if kind == "step":
        return StepEnd(step, float(result.as_numpy("sigma")[0]))
    images = [Image.fromarray(np.array(pixels)) for pixels in result.as_numpy("image")]
    if kind == "preview":
        return Preview(step, images)
    seeds, seconds = result.as_numpy("seeds"), result.as_numpy("seconds")
    seed: int | tuple[int, ...] | None = None if seeds is None else tuple(seeds.tolist())
    if isinstance(seed, tuple) and len(set(seed)) == 1:
        seed = seed[0]
    return FluxPipelineOutput(images, seed, dict(zip(STAGES, map(float, seconds), strict=True)))


def _code(error: Exception) -> str:
    """The name of gRPC's status, empty where there is none."""
    code = getattr(error, "code", None)
    return str(getattr(code(), "name", "")) if callable(code) else ""


def _details(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(details() if callable(details) else error)


def _failure(message: str, code: str = "") -> FluxDeployError:
    """The error of the host that a server's answer stands for."""
    ahead = _AHEAD.search(message)
    if ahead is not None:
        return QueueFullError(message, float(ahead[1]))
    if code in ("INVALID_ARGUMENT", "NOT_FOUND"):
        return UsageError(message)
    if code == "CANCELLED":
        return Cancelled(message)
    return EngineError(f"The Triton server has failed: {message}")
