"""``/v1/chat/completions``: answers to conversations with images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from uuid import uuid4

from fastapi import APIRouter, Response
from starlette.requests import Request

from janus_modular.answers import Answer
from janus_modular.server.api_errors import invalid
from janus_modular.server.chat_schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChatUsage,
    TextContent,
)
from janus_modular.server.event_stream import END, EventStream, event_line
from janus_modular.server.messages import Turn, read_messages
from janus_modular.server.openapi import ERRORS, STREAM
from janus_modular.server.service import (
    JobGroup,
    Service,
    applied_settings,
    log_record,
    merged_settings,
    seed_of,
)
from janus_modular.serving import AnswerRequest, Finished, TextDelta

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", "sampler": "stop", "image": "stop"}


def chat_router(service: Service) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter(tags=["chat"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, **STREAM})
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response | ChatCompletion:
        """Answer a conversation, with or without images."""
        service.check_model(body.model)
        jobs = await asyncio.to_thread(answer_requests, body, service, seed_of(request))
        log_record(request.scope).update(mode="answer", user=body.user)
        group = await service.submit(request, jobs)
        if body.stream:
            return EventStream(group, _chunks(body, group, service))
        answers: list[Answer] = await group.results(request)
        return chat_completion(answers, service.name)

    return router


def answer_requests(body: ChatRequest, service: Service, default_seed: int) -> list[AnswerRequest]:
    """Return the jobs of a request, one for each of its n answers; each has noise of its own."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: has no effect without stream. Leave it out.", param="stream_options")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid(
            "max_completion_tokens: differs from max_tokens, its older name. Give one.",
            param="max_completion_tokens",
        )
    n = body.n or 1
    service.check_limit("n", n, service.config.limits.n, "answers")
    settings = merged_settings(
        {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p}, body.settings
    )
    messages = read_messages([_turn(message.role, message.content) for message in body.messages], service)
    seed = default_seed if body.seed is None else body.seed
    return [
        AnswerRequest(
            messages,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
            seed=seed,
            max_new_tokens=body.max_tokens or body.max_completion_tokens,
            settings=settings | ({"numbers": (number,)} if n > 1 else {}),
            deadline=service.config.deadline,
        )
        for number in range(n)
    ]


def chat_completion(answers: Sequence[Answer], model: str) -> ChatCompletion:
    """Return answers in OpenAI's form."""
    return ChatCompletion(
        id=f"chatcmpl-{uuid4().hex}",
        created=int(time.time()),
        model=model,
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage(content=str(answer)),
                finish_reason=FINISH_REASONS[answer.finish_reason or "stop"],  # type: ignore[arg-type]
            )
            for index, answer in enumerate(answers)
        ],
        usage=_usage(answers),
        settings=applied_settings(answers[0].settings),
    )


class EdgeTrimmer:
    """Passes a text on in chunks, without white space at its ends: whole answers have none there."""

    def __init__(self) -> None:
        self._has_begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next chunk; return what is certain to be inside the text."""
        text = self._held + (text if self._has_begun else text.lstrip())
        kept = text.rstrip()
        self._has_begun = self._has_begun or bool(kept)
        self._held = text[len(kept) :]
        return kept


def _turn(role: str, content: str | Sequence[object]) -> Turn:
    if isinstance(content, str):
        return role, [("text", content)]
    return role, [
        ("text", part.text) if isinstance(part, TextContent) else ("image", part.image_url.url)  # type: ignore[attr-defined]
        for part in content
    ]


def _usage(answers: Sequence[Answer]) -> ChatUsage:
    prompt = sum(answer.usage.prompt_tokens for answer in answers)
    completion = sum(answer.usage.completion_tokens for answer in answers)
    return ChatUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def _chunks(body: ChatRequest, group: JobGroup, service: Service) -> AsyncIterator[str]:
    """Yield the events of a stream; the last chunk of each choice has the settings that were applied."""
    common = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.name,
    }
    includes_usage = body.stream_options is not None and body.stream_options.include_usage
    usage = {"usage": None} if includes_usage else {}

    def chunk(index: int, delta: dict[str, str], finish_reason: str | None = None, **more: object) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event_line({**common, "choices": [choice], **usage, **more})

    trimmers = [EdgeTrimmer() for _ in group.jobs]
    answers: list[Answer] = []
    for index in range(len(group.jobs)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in group.events():
        if isinstance(event, TextDelta) and (text := trimmers[index].push(event.text)):
            yield chunk(index, {"content": text})
        elif isinstance(event, Finished) and isinstance(event.result, Answer):
            answers.append(event.result)
            reason = FINISH_REASONS[event.result.finish_reason or "stop"]
            yield chunk(index, {}, reason, settings=applied_settings(event.result.settings))
    if includes_usage:
        yield event_line({**common, "choices": [], "usage": _usage(answers).model_dump()})
    yield END
