"""Requests of ``/v1/responses``: items of a conversation, and the tool that draws."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from janus_modular.arguments import ImageForm
from janus_modular.server.chat_schema import NO_LOGPROBS, NO_STORE, NO_TOOLS
from janus_modular.server.image_schema import DRAWING_FIELDS, EditRequest, OutputFormat
from janus_modular.server.requests import ApiModel, ModelName, Neutral, SamplerSettings, Seed, User

NO_FILES = "the server stores no files: send the image as a data URI in image_url"

ITEM_FIELDS: Neutral = {"phase": ((), "the model has no phases")}


class InputText(ApiModel):
    """A text of a message; ``output_text`` in earlier answers."""

    neutral: ClassVar[Neutral] = {
        "annotations": (([],), "the model has no annotations"),
        "logprobs": (([],), NO_LOGPROBS),
        "prompt_cache_breakpoint": ((), "the server finds shared beginnings of prompts itself"),
    }

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(ApiModel):
    """An image of a message."""

    neutral: ClassVar[Neutral] = {
        "detail": (("auto",), "images are read at the model's own size"),
        "file_id": ((), NO_FILES),
        "prompt_cache_breakpoint": ((), "the server finds shared beginnings of prompts itself"),
    }

    type: Literal["input_image"]
    image_url: str = Field(
        description="data:image/png;base64,... (PNG, JPEG, WebP or GIF); http(s) if allowed."
    )


InputContent = Annotated[InputText | InputImage, Field(discriminator="type")]


class MessageItem(ApiModel):
    """A message of the conversation, or an earlier answer as it came."""

    neutral: ClassVar[Neutral] = ITEM_FIELDS

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputContent]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None


class ImageCallItem(ApiModel):
    """An image that was drawn before, as it came: the model reads it as an image of the assistant."""

    neutral: ClassVar[Neutral] = {
        "error": ((), "an image that failed cannot be read"),
    }

    type: Literal["image_generation_call"]
    id: str
    result: str = Field(description="The image file in base64.")
    status: Literal["completed"] | None = None
    action: Literal["auto", "generate", "edit"] | None = None
    output_format: OutputFormat | None = None
    size: str | None = None
    background: str | None = None
    quality: str | None = None
    revised_prompt: str | None = None


class ImageTool(ApiModel):
    """The tool that draws, with its settings: those of ``/v1/images/generations``."""

    neutral: ClassVar[Neutral] = {
        **DRAWING_FIELDS,
        "input_fidelity": EditRequest.neutral["input_fidelity"],
        "input_image_mask": EditRequest.neutral["mask"],
        "model": ((), "the served model draws itself"),
    }

    type: Literal["image_generation"]
    action: Literal["auto", "generate", "edit"] | None = Field(
        None,
        description="generate: draw the last message's text. edit: draw from its images and its text; without"
        " images of its own, from the last image before it. auto, the default: edit if it has images.",
    )
    image_form: ImageForm | None = Field(None, description=EditRequest.model_fields["image_form"].description)
    size: str | None = None
    output_format: OutputFormat | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    partial_images: int | None = Field(None, ge=0, le=3)
    guidance: float | None = None
    temperature: float | None = Field(None, ge=0)
    seed: Seed = None
    settings: SamplerSettings = None


class ImageToolChoice(ApiModel):
    """The choice to draw."""

    type: Literal["image_generation"]


class ResponseRequest(ApiModel):
    """A conversation to continue by an answer or, with the tool, by a drawing of its last message."""

    neutral: ClassVar[Neutral] = {
        "background": ((False,), "answers come at once, or as a stream"),
        "conversation": ((), NO_STORE + ": send the earlier items in input"),
        "include": (([],), "answers hold all that there is"),
        "max_tool_calls": ((), "an answer draws one image"),
        "metadata": (({},), NO_STORE),
        "parallel_tool_calls": ((True, False), "an answer draws one image"),
        "previous_response_id": ((), NO_STORE + ": send the earlier items in input"),
        "prompt": ((), NO_STORE),
        "reasoning": (({},), "the model has no such setting"),
        "service_tier": (("auto", "default"), "all requests are served alike"),
        "store": ((False,), NO_STORE),
        "text": (({}, {"format": {"type": "text"}}), "answers are plain text"),
        "top_logprobs": ((0,), NO_LOGPROBS),
        "truncation": (("disabled",), "a conversation that is too long is an error"),
    }

    input: str | list[MessageItem | ImageCallItem] = Field(min_length=1)
    model: ModelName = None
    instructions: str | None = Field(None, description="A system message before the conversation.")
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, description="0, the default: the most likely token.")
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: Seed = None
    settings: SamplerSettings = None
    stream: bool | None = None
    tools: list[ImageTool] | None = Field(None, max_length=1, description=NO_TOOLS + " but this one.")
    tool_choice: Literal["none", "auto", "required"] | ImageToolChoice | None = None
    user: User = None


class ResponseBody(BaseModel):
    """An answer: one message, or one drawn image. ``settings`` are those that the sampler applied."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float | None
    top_p: float | None
    tool_choice: Any
    tools: list[dict[str, Any]]
    metadata: dict[str, str] = Field(default_factory=dict)
    usage: dict[str, Any] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
