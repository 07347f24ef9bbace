"""The ASGI application of a service: routes, errors, middleware, start and end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from janus_modular import __version__
from janus_modular.errors import JanusError
from janus_modular.server.api_errors import ApiError, api_error, validation_error
from janus_modular.server.chat_routes import chat_router
from janus_modular.server.image_routes import image_router
from janus_modular.server.middleware import Gate, RequestLog
from janus_modular.server.misplaced_settings import misplaced_setting
from janus_modular.server.openapi import describe
from janus_modular.server.responses_routes import responses_router
from janus_modular.server.service import ClientGoneError, Service
from janus_modular.server.status_routes import status_router
from janus_modular.serving import AnswerRequest, DrawRequest, Progress

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status in the log of a request whose client has closed the connection."""


def create_app(service: Service) -> FastAPI:
    """Return the application that serves a model; it closes the service's engine when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(_warm_up(service))
        try:
            yield
        finally:
            service.is_ready = False
            warming.cancel()
            with suppress(asyncio.CancelledError):
                await warming
            await asyncio.to_thread(service.engine.close, drain=False)
            if service.traces is not None:
                await asyncio.to_thread(service.traces.close)

    async def answer_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _response(misplaced_setting(service, request.url.path, error) or error)

    async def answer_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await answer_api_error(request, validation_error(error.errors()))

    app = FastAPI(
        title=f"janus-modular: {service.name}",
        description="Text and images of one model, over OpenAI's API.",
        version=__version__,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    for router in (chat_router, image_router, responses_router, status_router):
        app.include_router(router(service))
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(JanusError, _answer_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGoneError, _answer_closed_connection)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_middleware(
        Gate, hosts=service.config.accepted_hosts, keys=service.keys, limits=service.config.limits
    )
    app.add_middleware(RequestLog)
    description = describe(app, has_keys=bool(service.keys))
    app.openapi = lambda: description  # type: ignore[method-assign]
    return app


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_error(_: Request, error: Exception) -> Response:
    return _response(api_error(error))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    """Answer what the framework refuses: unknown paths and methods, bodies that cannot be read."""
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_path", 405: "unknown_method", 408: "body_too_slow", 413: "body_too_large"}
    code = codes.get(error.status_code, "invalid_body")
    return _response(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


async def _answer_closed_connection(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    """Return status 500 for an unexpected error, which the server logs.

    uvicorn closes the connection then: without the header, the client's next request may be on it already.
    """
    text, headers = "the server failed to answer this request.", {"connection": "close"}
    return _response(ApiError(500, text, code="internal_error", headers=headers))


async def _warm_up(service: Service) -> None:
    """Compute a token and a code, so that graphs are loaded; then the service is ready.

    What the model does not have (a bundle of drawing alone) is skipped.
    """
    requests: list[AnswerRequest | DrawRequest] = [AnswerRequest("a", max_new_tokens=1), DrawRequest("a")]
    for request in requests if service.config.warm_up else ():
        try:
            job = await asyncio.to_thread(service.engine.submit, request)
            try:
                async for event in job:
                    if isinstance(event, Progress):  # the first code
                        break
            finally:
                job.cancel()
        except JanusError as error:
            log.warning("warm-up: %s", error)
    service.is_ready = True
