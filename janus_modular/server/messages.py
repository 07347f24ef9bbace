"""OpenAI's messages as those of the model, with their images decoded under the server's limits."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence

from PIL import Image

from janus_modular.errors import ImageError
from janus_modular.processing.image_io import open_image
from janus_modular.sequence import ImageInput, Message, Segment, Text
from janus_modular.server.api_errors import invalid
from janus_modular.server.image_addresses import fetch_image
from janus_modular.server.service import Service

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Formats of images in requests, as Pillow calls them; decoders of others are never started."""

DATA = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)

Turn = tuple[str, Sequence[tuple[str, str]]]
"""A role, and its contents: ("text", the text) or ("image", the address)."""


def read_messages(turns: Sequence[Turn], service: Service) -> list[Message]:
    """Return a conversation for the model. Decodes and fetches images: call it in a thread.

    Raises:
        ApiError: there is more text, or there are more images, than the server takes.
        ImageError: an image cannot be read, or is larger than the server takes.
    """
    check_text_and_images(turns, service)
    return [
        Message("system" if role == "developer" else role, [*_segments(contents, service)])
        for role, contents in turns
    ]


def check_text_and_images(turns: Sequence[Turn], service: Service) -> None:
    """Check the amount of text and the number of images, before any is decoded."""
    limits = service.config.limits
    texts = [content for _, contents in turns for sort, content in contents if sort == "text"]
    images = sum(sort == "image" for _, contents in turns for sort, _ in contents)
    service.check_limit("messages", sum(map(len, texts)), limits.prompt, "characters")
    service.check_limit("messages", images, limits.images, "images")


def _segments(contents: Sequence[tuple[str, str]], service: Service) -> Iterator[Segment]:
    for sort, content in contents:
        if sort == "text":
            yield Text(content)
        else:
            yield ImageInput(read_image(content, service))


def read_image(url: str, service: Service) -> Image.Image:
    """Return the image of a data URI, or of an address where addresses are allowed.

    Raises:
        ApiError: addresses are not allowed, or the URI is not one of an image.
        ImageError: the image cannot be fetched or read, or is larger than the server takes.
    """
    source = image_bytes(url, service)
    return open_image(source, max_pixels=service.config.limits.pixels, formats=FORMATS)


def image_bytes(url: str, service: Service) -> bytes:
    """Return the file that a data URI holds, or that an address names where addresses are allowed.

    Raises:
        ApiError: addresses are not allowed, or the URI is not one of an image.
        ImageError: the address cannot be fetched.
    """
    if url[:8].lower().startswith(("http://", "https://")):
        if not service.config.fetch_images:
            raise invalid(
                "image_url: this server fetches no addresses; send the image as a data URI.",
                param="image_url",
                code="image_address_refused",
            )
        return fetch_image(url, max_bytes=service.config.limits.body)
    header = DATA.match(url)
    if header is None:
        raise invalid(
            "image_url: expected data:image/png;base64,... (or jpeg, webp, gif).",
            param="image_url",
            code="invalid_image",
        )
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("image_url: the data URI is not valid base64.") from error
