"""Requests and answers of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from janus_modular.server.requests import ApiModel, ModelName, Neutral, SamplerSettings, Seed, User

NO_TOOLS = "the model calls no tools"
NO_LOGPROBS = "sampling happens inside the model's graphs, which return token ids and no probabilities"
NO_STORE = "the server stores nothing"


class ImageAddress(ApiModel):
    """An image of a message."""

    neutral: ClassVar[Neutral] = {"detail": (("auto",), "images are read at the model's own size")}

    url: str = Field(description="data:image/png;base64,... (PNG, JPEG, WebP or GIF); http(s) if allowed.")


class TextContent(ApiModel):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageContent(ApiModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]

MESSAGE_FIELDS: Neutral = {
    "name": ((), "the model's template has no names of participants"),
    "refusal": ((), "the model has no refusals apart from text"),
    "audio": ((), "the model has no audio"),
    "annotations": (([],), "the model has no annotations"),
    "tool_calls": (([],), NO_TOOLS),
    "function_call": ((), NO_TOOLS),
}


class SystemMessage(ApiModel):
    """Instructions; ``developer`` is OpenAI's newer name of ``system``."""

    neutral: ClassVar[Neutral] = MESSAGE_FIELDS

    role: Literal["system", "developer"]
    content: str | list[TextContent]


class UserMessage(ApiModel):
    """A question: texts and images, in order."""

    neutral: ClassVar[Neutral] = MESSAGE_FIELDS

    role: Literal["user"]
    content: str | list[Content]


class AssistantMessage(ApiModel):
    """An earlier answer."""

    neutral: ClassVar[Neutral] = MESSAGE_FIELDS

    role: Literal["assistant"]
    content: str | list[TextContent]


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(ApiModel):
    """How an answer is streamed."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": ((False,), "chunks are not padded")}

    include_usage: bool = Field(False, description="Send token counts in a last chunk without choices.")


class ChatRequest(ApiModel):
    """A conversation to continue."""

    neutral: ClassVar[Neutral] = {
        "audio": ((), "the model has no audio"),
        "frequency_penalty": ((0, 0.0), "the model's sampler has no penalties"),
        "presence_penalty": ((0, 0.0), "the model's sampler has no penalties"),
        "function_call": (("none",), NO_TOOLS),
        "functions": (([],), NO_TOOLS),
        "logit_bias": (({},), "the model's sampler has no biases"),
        "logprobs": ((False,), NO_LOGPROBS),
        "top_logprobs": ((0,), NO_LOGPROBS),
        "metadata": (({},), NO_STORE),
        "modalities": ((["text"],), "answers are texts; draw with /v1/images/generations"),
        "parallel_tool_calls": ((True, False), NO_TOOLS),
        "prediction": ((), "answers are not predicted"),
        "reasoning_effort": (("none",), "the model has no such setting"),
        "response_format": (({"type": "text"},), "answers are plain text"),
        "service_tier": (("auto", "default"), "all requests are served alike"),
        "store": ((False,), NO_STORE),
        "tool_choice": (("none", "auto"), NO_TOOLS),
        "tools": (([],), NO_TOOLS),
        "verbosity": ((), "the model has no such setting"),
        "web_search_options": ((), NO_TOOLS),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    model: ModelName = None
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; null: the sampler's default.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    temperature: float | None = Field(None, ge=0, description="0, the default: the most likely token.")
    top_k: int | None = Field(None, ge=0, description="Sample from the k most likely tokens; 0: from all.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Sample from the smallest set of probability p."
    )
    seed: Seed = None
    settings: SamplerSettings = None
    stop: str | list[str] | None = Field(None, description="Strings before which the answer ends.")
    n: int | None = Field(None, ge=1, description="Number of answers, each with noise of its own.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User = None


class ChatUsage(BaseModel):
    """Token counts of all choices of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """Answers to a conversation. ``settings`` are those that the sampler applied."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    settings: dict[str, Any]
