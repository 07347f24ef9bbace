"""The parts of the OpenAPI description that routes share."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from janus_modular.server.api_errors import ErrorResponse

DESCRIPTIONS = {
    400: "The request is invalid, or asks for what the model or the server does not do.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "The queue is full: try again after the seconds of Retry-After.",
    500: "The server failed.",
    503: "The server is shutting down.",
    504: "The deadline of the request has passed.",
}
"""The errors that any route of the API may answer with."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in DESCRIPTIONS.items()
}

EVENT = {
    "type": "object",
    "description": "The fields of one event; data is JSON, and [DONE] at the end of a chat completion.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream, events.",
        # As OpenAPI 3.2 describes the events of a stream, each by itself.
        "content": {"text/event-stream": {"itemSchema": EVENT}},
    }
}


def describe(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """Return the description of an app, without FastAPI's 422: invalid requests are answered with 400."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    components = schema.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
    return schema
