"""What goes wrong with a request, as OpenAI's clients read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fluxdeploy.errors import Cancelled, FluxDeployError, QueueFullError, UsageError

__all__ = ["ApiError", "as_api_error"]

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than what was asked for. `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = _KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": None}
        return {"error": error}


def as_api_error(error: FluxDeployError) -> ApiError:
    """What a call that raised this is answered with."""
    if isinstance(error, QueueFullError):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return ApiError(503, str(error), headers={"Retry-After": seconds})
    if isinstance(error, Cancelled):
        return ApiError(503, str(error))
    return ApiError(400 if isinstance(error, UsageError) else 500, str(error))
