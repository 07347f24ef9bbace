"""Requests and answers of ``/v1/images/generations`` and ``/v1/images/edits``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from janus_modular.arguments import ImageForm
from janus_modular.server.requests import ApiModel, ModelName, Neutral, SamplerSettings, Seed, User

OutputFormat = Literal["png", "jpeg", "webp"]

DRAWING_FIELDS: Neutral = {
    "background": (("auto", "opaque"), "the model draws opaque images"),
    "moderation": (("auto",), "the server has no moderation"),
    "quality": (
        ("auto", "standard"),
        "the model draws in one quality; guidance and temperature are settings",
    ),
}
"""Fields of requests for images and of the image tool that have no effect."""


class ImageRequest(ApiModel):
    """Images to draw."""

    neutral: ClassVar[Neutral] = {
        **DRAWING_FIELDS,
        "response_format": (
            ("b64_json",),
            "the server stores no images: they come as b64_json, not as a url",
        ),
        "style": ((), "write the style into the prompt"),
    }

    prompt: str = Field(min_length=1)
    model: ModelName = None
    n: int | None = Field(None, ge=1, description="Number of images, each with noise of its own.")
    size: str | None = Field(None, description="auto, the model's own size, or WIDTHxHEIGHT.")
    output_format: OutputFormat | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    guidance: float | None = Field(None, description="Guidance scale; 1: no guidance.")
    temperature: float | None = Field(None, ge=0, description="0: always the most likely code.")
    seed: Seed = None
    settings: SamplerSettings = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="Half-drawn images in the stream.")
    user: User = None


class EditRequest(ImageRequest):
    """Images to draw from images: the fields of a form beside its files."""

    neutral: ClassVar[Neutral] = {
        **ImageRequest.neutral,
        "input_fidelity": (("low",), "the model gets the images as image_form says"),
        "mask": ((), "the model draws the whole image again; settings.prefix keeps an image's first codes"),
    }

    image_form: ImageForm | None = Field(
        None,
        description="How the model gets the images: input, for its understanding encoder (default);"
        " encoded, as it draws images; or both, as Janus-4o was trained.",
    )


class TokensByMode(BaseModel):
    """Tokens of texts and of images."""

    text_tokens: int
    image_tokens: int


class ImageUsage(BaseModel):
    """Token counts of all images of an answer: a prompt counts for each of them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokensByMode
    output_tokens_details: TokensByMode


class ImageData(BaseModel):
    """A drawn image."""

    b64_json: str


class ImageAnswer(BaseModel):
    """Drawn images. ``settings`` are those that the sampler applied."""

    created: int
    model: str
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: ImageUsage
    settings: dict[str, Any]
