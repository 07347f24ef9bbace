"""The model that is served, and the state of the server."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse

from janus_modular.protocols import VariantRuntime
from janus_modular.server.openapi import ERRORS
from janus_modular.server.service import Service


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "janus-modular"
    context: int  # longest sequence, in positions
    image_size: str | None  # in which it draws: WIDTHxHEIGHT; null: it does not draw
    text_sampler: str
    image_sampler: str
    runtime: str
    variant: str | None  # of a bundle


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """Whether the server works."""

    status: Literal["ok", "ready", "starting", "failed"]


def model_card(service: Service) -> ModelCard:
    """Return the description of the served model."""
    janus = service.janus
    drawing, runtime = janus.processor.drawing, janus.runtime
    return ModelCard(
        id=service.name,
        created=service.created,
        context=runtime.context,
        image_size=f"{drawing.width}x{drawing.height}" if drawing else None,
        text_sampler=runtime.text_sampler,
        image_sampler=runtime.image_sampler,
        runtime=type(runtime).__name__,
        variant=runtime.variant if isinstance(runtime, VariantRuntime) else None,
    )


def status_router(service: Service) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter(tags=["server"])

    @router.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        """List the served model."""
        return ModelList(data=[model_card(service)])

    @router.get("/v1/models/{model}", responses=ERRORS)
    async def retrieve_model(model: str) -> ModelCard:
        """Describe the served model."""
        service.check_model(model)
        return model_card(service)

    @router.get("/health", responses={503: {"model": Status, "description": "The engine has stopped."}})
    async def health() -> Response:
        """Answer with 200 as long as requests are computed: restart the process if this fails."""
        is_alive = service.engine.is_alive
        status = Status(status="ok" if is_alive else "failed")
        return JSONResponse(status.model_dump(), 200 if is_alive else 503)

    @router.get("/ready", responses={503: {"model": Status, "description": "The model is warming up."}})
    async def ready() -> Response:
        """Answer with 200 once requests are computed at full speed: send requests only then."""
        status = Status(status="ready" if service.is_ready else "starting")
        return JSONResponse(status.model_dump(), 200 if service.is_ready else 503)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.text(service.engine.stats()), media_type=CONTENT_TYPE_LATEST)

    for path, endpoint in {"/health": health, "/ready": ready, "/metrics": metrics}.items():
        router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)  # some probes
    return router
