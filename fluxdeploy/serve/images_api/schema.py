"""What the OpenAPI document says of bodies that FastAPI does not read."""

from __future__ import annotations

from typing import Any

from fluxdeploy.serve.images_api.bodies import EditBody, GenerationBody
from fluxdeploy.serve.images_api.uploads import ALONE, SEEN

__all__ = ["EDIT", "GENERATION", "RESPONSES"]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}

_MEANINGS = {
    400: "Something in the request cannot be.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or picture.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    503: "As many calls wait as may; Retry-After tells when to come again.",
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in _MEANINGS.items()
}


def _request(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _edit_schema() -> dict[str, Any]:
    schema = EditBody.model_json_schema()
    file = {"type": "string", "format": "binary"}
    files = {
        "image": {"anyOf": [file, {"type": "array", "items": file}]},
        "mask": file,
        "control_image": {"anyOf": [file, {"type": "array", "items": file}]},
        "redux_image": {"anyOf": [file, {"type": "array", "items": file}]},
        **dict.fromkeys(SEEN, file),
    }
    schema["properties"] = {**schema["properties"], **files}
    schema["anyOf"] = [{"required": [name]} for name in ALONE]
    return schema


GENERATION = _request("application/json", GenerationBody.model_json_schema())
EDIT = _request("multipart/form-data", _edit_schema())
