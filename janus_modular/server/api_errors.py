"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from janus_modular.errors import (
    CheckError,
    DeadlineError,
    ImageError,
    JanusError,
    JournalError,
    NotFiniteError,
    PromptError,
    RequestCancelledError,
    ServingError,
)
from janus_modular.foreign import printable

log = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}
"""The type of an error by its HTTP status; of others invalid_request_error, or server_error from 500 on."""

JOURNAL_SECONDS = 30
"""After which a drawing is tried again that the journal did not take: a disk is not emptied at once."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error_type = TYPES.get(self.status, default)
        error = ErrorBody(message=str(self), type=error_type, param=self.param, code=self.code)
        return ErrorResponse(error=error).model_dump()


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error of a request that its sender can fix."""
    return ApiError(400, message, code=code, param=param)


def no_effect(param: str, reason: str) -> ApiError:
    """Return the error of a setting that would have no effect."""
    return invalid(f"{param}: {reason}. Leave it out.", param=param, code="unsupported_parameter")


def deadline_error() -> ApiError:
    """Return the answer to a request that its deadline ended."""
    return ApiError(
        504,
        "the request was cancelled at its deadline. Ask for less (fewer tokens, one image), or try again when"
        " the server has fewer requests.",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},  # OpenAI's clients would repeat it at once
    )


def api_error(error: BaseException) -> ApiError:
    """Return the answer to an exception; one that no client caused is logged, and its text kept back."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlineError):
        return deadline_error()
    if isinstance(error, JournalError):
        log.error("a drawing is refused: %s", error)
        return ApiError(
            503,
            "the server cannot record drawings at the moment, so it refuses them. Try again later, or another"
            " server.",
            code="journal_unavailable",
            headers={"retry-after": str(JOURNAL_SECONDS)},
        )
    if isinstance(error, RequestCancelledError):
        return ApiError(503, "the server is shutting down.", code="shutting_down")
    if isinstance(error, NotFiniteError | CheckError | ServingError) or not isinstance(error, JanusError):
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed to answer this request.", code="internal_error")
    code = {ImageError: "invalid_image", PromptError: "invalid_prompt"}.get(type(error), "invalid_value")
    return invalid(str(error), code=code)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the answer to a request that does not fit its schema; names the first field that is wrong.

    Values are not repeated: a message of megabytes may hold them.
    """
    first = errors[0]
    location = [str(name) for name in first["loc"] if name not in ("body", "query", "path", "header")]
    param = printable(".".join(location), most=200) or None
    if first["type"] == "json_invalid":
        return invalid("the body is not JSON: expected one JSON object.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return invalid(
            f"{param}: unknown, so that it would have no effect. Leave it out; /openapi.json has all fields.",
            param=param,
            code="unknown_parameter",
        )
    more = f" ({len(errors) - 1} more errors)" if len(errors) > 1 else ""
    text = printable(first["msg"].removeprefix("Value error, "), most=1000)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return invalid(f"{param}: {text}{more}" if param else f"{text}{more}", param=param, code=code)
