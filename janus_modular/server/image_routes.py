"""``/v1/images``: drawings of a prompt, or of images and a prompt, whole or while they are drawn."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from fastapi import APIRouter, Response
from PIL import Image
from starlette.requests import Request

from janus_modular.answers import Drawings, Usage
from janus_modular.errors import PromptError
from janus_modular.image_sizes import chosen_size, parse_size
from janus_modular.server.api_errors import ApiError, invalid
from janus_modular.server.event_stream import EventStream, event_line
from janus_modular.server.image_edits import form_schema, read_form
from janus_modular.server.image_schema import (
    ImageAnswer,
    ImageData,
    ImageRequest,
    ImageUsage,
    OutputFormat,
    TokensByMode,
)
from janus_modular.server.openapi import ERRORS, STREAM
from janus_modular.server.service import (
    JobGroup,
    Service,
    applied_settings,
    log_record,
    merged_settings,
    request_id,
    seed_of,
)
from janus_modular.serving import DrawRequest, Finished, PartialImage

NO_VARIATIONS = (
    "the server draws by a prompt. Draw with /v1/images/generations, or from images and a prompt with"
    " /v1/images/edits."
)


def image_router(service: Service) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter(tags=["images"])

    @router.post("/v1/images/generations", response_model=ImageAnswer, responses={**ERRORS, **STREAM})
    async def create_image(body: ImageRequest, request: Request) -> Response | ImageAnswer:
        """Draw images of a prompt."""
        return await draw(body, request)

    @router.post(
        "/v1/images/edits",
        response_model=ImageAnswer,
        responses={**ERRORS, **STREAM},
        openapi_extra=form_schema(),
    )
    async def edit_images(request: Request) -> Response | ImageAnswer:
        """Draw images of images and a prompt that says what to change."""
        body, images = await read_form(request, service)
        return await draw(body, request, images=images, image_form=body.image_form or "input")

    async def draw(body: ImageRequest, request: Request, **inputs: Any) -> Response | ImageAnswer:
        service.check_model(body.model)
        drawing = replace(draw_request(body, service, request), **inputs)
        log_record(request.scope).update(mode="draw", user=body.user)
        group = await service.submit(request, [drawing])
        if body.stream:
            return EventStream(group, _events(body, group, service))
        [drawings] = await group.results(request)
        return await asyncio.to_thread(image_answer, drawings, body, service)

    @router.post("/v1/images/variations", responses=ERRORS, response_model=None)
    async def refuse_variations() -> Response:
        """Refuse, with the reason."""
        raise ApiError(400, NO_VARIATIONS, code="unsupported_endpoint")

    return router


def draw_request(body: ImageRequest, service: Service, request: Request) -> DrawRequest:
    """Return the job of a request.

    Raises:
        ApiError: a field has no effect, or asks for more than the server or the model can.
    """
    if body.partial_images and not body.stream:
        raise invalid("partial_images: has no effect without stream. Leave it out.", param="partial_images")
    if body.output_compression not in (None, 100) and body.output_format in (None, "png"):
        raise invalid(
            "output_compression: has no effect on png, which is lossless. Leave it out, or ask for jpeg.",
            param="output_compression",
        )
    n = body.n or 1
    service.check_limit("n", n, service.config.limits.n, "images")
    service.check_limit("prompt", len(body.prompt), service.config.limits.prompt, "characters")
    size = requested_size(body.size, service)
    settings = merged_settings({"guidance": body.guidance, "temperature": body.temperature}, body.settings)
    return DrawRequest(
        body.prompt,
        n,
        size=size,
        seed=seed_of(request) if body.seed is None else body.seed,
        guidance=settings.pop("guidance", None),
        temperature=settings.pop("temperature", None),
        settings=settings,
        partial_images=body.partial_images or 0,
        deadline=service.config.deadline,
        request_id=None if service.config.journal is None else request_id(request),
    )


def requested_size(size: str | None, service: Service) -> tuple[int, int] | None:
    """Return the size (height, width) of a request's ``WIDTHxHEIGHT``; None: the model's own.

    Raises:
        ApiError: the model does not draw the size, or draws nothing at all; says why.
    """
    janus = service.janus
    if janus.processor.drawing is None:
        raise invalid("this model has no generation path: it cannot draw.", code="unsupported_endpoint")
    if size is None or size == "auto":
        return None
    try:
        sides = parse_size(size)
        chosen_size(janus.runtime, janus.processor, sides)
    except PromptError as error:
        raise invalid(str(error), param="size") from error
    return sides


def encode_image(image: Image.Image, output_format: OutputFormat, quality: int | None) -> str:
    """Return an image as a file in base64."""
    file = BytesIO()
    options = {} if output_format == "png" else {"quality": 100 if quality is None else quality}
    image.save(file, output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def image_answer(drawings: Drawings, body: ImageRequest, service: Service) -> ImageAnswer:
    """Return drawings in OpenAI's form."""
    output_format = body.output_format or "png"
    files = [encode_image(image, output_format, body.output_compression) for image in drawings]
    return ImageAnswer(
        created=int(time.time()),
        model=service.name,
        data=[ImageData(b64_json=file) for file in files],
        output_format=output_format,
        size=image_size(drawings[0]),
        usage=image_usage(drawings.usage),
        settings=applied_settings(drawings.settings),
    )


def image_size(image: Image.Image) -> str:
    """Return the size of an image as the API writes it."""
    return f"{image.width}x{image.height}"


def image_usage(usages: Sequence[Usage]) -> ImageUsage:
    """Return the token counts of images."""
    prompts, images = sum(u.prompt_tokens for u in usages), sum(u.image_tokens for u in usages)
    read = sum(u.prompt_image_tokens for u in usages)
    return ImageUsage(
        input_tokens=prompts,
        output_tokens=images,
        total_tokens=prompts + images,
        input_tokens_details=TokensByMode(text_tokens=prompts - read, image_tokens=read),
        output_tokens_details=TokensByMode(text_tokens=0, image_tokens=images),
    )


async def _events(body: ImageRequest, group: JobGroup, service: Service) -> AsyncIterator[str]:
    """Yield partial images as they come, and at the end all images; ``image_index`` says which of the n."""
    output_format = body.output_format or "png"
    common = {"background": "opaque", "output_format": output_format, "quality": "auto"}

    async def event(name: str, image: Image.Image, index: int, **more: object) -> str:
        data = await asyncio.to_thread(encode_image, image, output_format, body.output_compression)
        fields = {"type": name, "b64_json": data, "created_at": int(time.time()), "size": image_size(image)}
        return event_line({**fields, **common, "image_index": index, **more}, name=name)

    async for _, item in group.events():
        if isinstance(item, PartialImage):
            name = "image_generation.partial_image"
            yield await event(name, item.image, item.index, partial_image_index=item.number)
        elif isinstance(item, Finished) and isinstance(item.result, Drawings):
            settings = applied_settings(item.result.settings)
            for index, (image, usage) in enumerate(zip(item.result, item.result.usage, strict=True)):
                more = {
                    "model": service.name,
                    "usage": image_usage([usage]).model_dump(),
                    "settings": settings,
                }
                yield await event("image_generation.completed", image, index, **more)
