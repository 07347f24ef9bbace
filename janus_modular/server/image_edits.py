"""The form of ``/v1/images/edits``: its files are images, its other fields those of a drawing."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from typing import Any

from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from janus_modular.foreign import printable
from janus_modular.processing.image_io import open_image
from janus_modular.server.api_errors import invalid, validation_error
from janus_modular.server.image_schema import EditRequest
from janus_modular.server.messages import FORMATS
from janus_modular.server.service import Service

IMAGE_FIELDS = ("image", "image[]")
"""Names under which clients send one image, or several."""

FORM = "multipart/form-data"

SETTING = re.compile(r"settings\[(\w+)\](\[\])?")
"""A setting of the sampler, or an item of one that is a list, as a field of its own."""

NO_TEXT = object()
"""The value of a field that is a file, and none of the schema's."""

JSON_FIELDS = (
    "n",
    "output_compression",
    "guidance",
    "temperature",
    "seed",
    "settings",
    "stream",
    "partial_images",
)
"""Fields that are no text: their value is read as JSON."""

MAX_FIELDS = 100
"""Fields of a form that are read; a setting of the sampler may be one each."""


def form_schema() -> dict[str, Any]:
    """Return the OpenAPI description of the form."""
    schema = EditRequest.model_json_schema()
    schema["properties"]["image"] = {
        "description": "One image or several, which come before the prompt: png, jpeg, webp or gif.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
    }
    schema["required"].append("image")
    return {"requestBody": {"required": True, "content": {FORM: {"schema": schema}}}}


async def read_form(request: Request, service: Service) -> tuple[EditRequest, list[Image.Image]]:
    """Return the fields of a request's form, and its images, decoded.

    Raises:
        ApiError: the body is no form, a field is unknown, of another type or has no effect, or there is no
            image, or more than the server takes.
        ImageError: an image cannot be read, or is larger than the server takes.
    """
    if not request.headers.get("content-type", "").lower().startswith(FORM):
        raise invalid(f"the body is no form: expected {FORM} with the file `image`.", code="invalid_form")
    limits = service.config.limits
    try:
        async with request.form(
            max_files=limits.images + 1, max_fields=MAX_FIELDS, max_part_size=4 * limits.prompt
        ) as form:
            files, fields = _divided(form.multi_items())
            contents = [await file.read() for file in files]
    except HTTPException as error:
        if error.status_code != 400:  # too large, or too slow
            raise
        raise invalid(f"the form cannot be read: {printable(error.detail)}", code="invalid_form") from error
    service.check_limit("image", len(files), limits.images, "images")
    try:
        body = EditRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()) from error
    if not files:
        message = "image: found none; expected at least one file."
        raise invalid(message, param="image", code="missing_required_parameter")
    images = await asyncio.to_thread(
        lambda: [open_image(content, max_pixels=limits.pixels, formats=FORMATS) for content in contents]
    )
    return body, images


def _divided(items: Iterable[tuple[str, str | UploadFile]]) -> tuple[list[UploadFile], dict[str, Any]]:
    """Return the files of images, and all other fields with their values as JSON has them."""
    files, fields, settings = list[UploadFile](), dict[str, Any](), dict[str, Any]()
    for name, value in items:
        setting = SETTING.fullmatch(name)
        if name in IMAGE_FIELDS:
            if isinstance(value, str):
                raise invalid("image: found a text; expected a file.", param="image")
            files.append(value)
        elif setting and setting[2] and isinstance(settings.get(setting[1], []), list):
            settings.setdefault(setting[1], []).append(_json(value))
        elif name in fields or (setting and setting[1] in settings):
            raise invalid(f"{printable(name)}: found twice; expected one value.", param=printable(name))
        elif setting:
            settings[setting[1]] = _json(value)
        else:  # a mask, say, is a file that is refused with the reason
            fields[name] = value if isinstance(value, str) and name not in JSON_FIELDS else _json(value)
    if settings:
        if "settings" in fields:
            raise invalid(
                "settings: found as JSON and as single fields; expected one of both.", param="settings"
            )
        fields["settings"] = settings
    return files, fields


def _json(text: str | UploadFile) -> Any:
    """Return the value of a text in JSON, or the text, which the schema then refuses."""
    if not isinstance(text, str):
        return NO_TEXT
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
