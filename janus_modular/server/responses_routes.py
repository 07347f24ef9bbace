"""``/v1/responses``: answers to items of a conversation, and drawings by the tool ``image_generation``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Response
from starlette.requests import Request

from janus_modular.answers import Answer, Drawings
from janus_modular.server.api_errors import invalid, no_effect
from janus_modular.server.chat_routes import EdgeTrimmer
from janus_modular.server.event_stream import EventStream, event_line
from janus_modular.server.image_routes import draw_request, encode_image, image_size
from janus_modular.server.image_schema import ImageRequest
from janus_modular.server.messages import Turn, read_image, read_messages
from janus_modular.server.openapi import ERRORS, STREAM
from janus_modular.server.responses_schema import (
    ImageCallItem,
    ImageTool,
    InputText,
    ResponseBody,
    ResponseRequest,
)
from janus_modular.server.service import (
    JobGroup,
    Service,
    applied_settings,
    log_record,
    merged_settings,
    seed_of,
)
from janus_modular.serving import AnswerRequest, DrawRequest, Finished, PartialImage, TextDelta


def responses_router(service: Service) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter(tags=["responses"])

    @router.post("/v1/responses", response_model=ResponseBody, responses={**ERRORS, **STREAM})
    async def create_response(body: ResponseRequest, request: Request) -> Response | ResponseBody:
        """Continue a conversation by an answer, or by a drawing."""
        service.check_model(body.model)
        builder = ResponseBuilder(body, service, request)
        job = await asyncio.to_thread(builder.job)
        log_record(request.scope).update(mode="draw" if builder.tool else "answer", user=body.user)
        group = await service.submit(request, [job])
        if body.stream:
            return EventStream(group, builder.events(group))
        [result] = await group.results(request)
        return await asyncio.to_thread(builder.body, result)

    return router


def chosen_tool(body: ResponseRequest) -> ImageTool | None:
    """Return the tool that draws, if the request chooses it.

    Raises:
        ApiError: the choice is left to the model, which makes none, or it names a tool that is not there.
    """
    tool, choice = next(iter(body.tools or ()), None), body.tool_choice or "auto"
    if tool is None:
        if choice not in ("auto", "none"):
            raise invalid("tool_choice: there is no such tool in tools.", param="tool_choice")
        return None
    if choice == "auto":
        raise invalid(
            "tool_choice: the model does not choose by itself whether to answer or to draw. Set"
            ' {"type": "image_generation"} to draw, or none.',
            param="tool_choice",
        )
    return None if choice == "none" else tool


def drawing_inputs(turns: Sequence[Turn], tool: ImageTool) -> tuple[str, list[str]]:
    """Return the text that a drawing follows, and the addresses of the images that it is drawn from.

    Both are those of the last message. Where the tool is to edit and that message has no image, the last
    image before it is taken: an image of an earlier message, or one that was drawn.

    Raises:
        ApiError: the last item is no message of the user or has no text, there is no image to edit, or images
            or the tool's ``image_form`` would have no effect.
    """
    role, contents = turns[-1]
    if role != "user":
        raise invalid("input: expected a message of the user as the last item, to be drawn.", param="input")
    text = " ".join(text for sort, text in contents if sort == "text")
    if not text.strip():
        raise invalid("input: the last message has no text; expected what to draw.", param="input")
    images = [address for sort, address in contents if sort == "image"]
    if images and tool.action == "generate":
        raise invalid(
            "input: the last message has images, and `generate` draws from its text alone. Leave the images"
            " out, or set the tool's action to `edit`.",
            param="input",
        )
    if not images and tool.action == "edit":
        earlier = [address for _, contents in turns for sort, address in contents if sort == "image"]
        if not earlier:
            raise invalid("input: found no image; expected one to edit.", param="input")
        images = earlier[-1:]
    if not images and tool.image_form is not None:
        raise no_effect("image_form", "has no effect on a drawing from text alone")
    return text, images


class ResponseBuilder:
    """One request: its job, and the answer made of the job's events."""

    def __init__(self, body: ResponseRequest, service: Service, http_request: Request) -> None:
        self._request, self._service, self._http_request = body, service, http_request
        self.tool = chosen_tool(body)
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())
        self._item_id = f"{'ig' if self.tool else 'msg'}_{uuid4().hex}"
        self._numbers = iter(range(2**31))

    def job(self) -> AnswerRequest | DrawRequest:
        """Return the job; decodes images: call it in a thread."""
        return self._draw_request(self.tool) if self.tool else self._answer_request()

    def _answer_request(self) -> AnswerRequest:
        body, service = self._request, self._service
        named = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p}
        return AnswerRequest(
            read_messages(list(self._turns()), service),
            seed=seed_of(self._http_request) if body.seed is None else body.seed,
            max_new_tokens=body.max_output_tokens,
            settings=merged_settings(named, body.settings),
            deadline=service.config.deadline,
        )

    def _draw_request(self, tool: ImageTool) -> DrawRequest:
        body = self._request
        for name in (
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_k",
            "top_p",
            "seed",
            "settings",
        ):
            if getattr(body, name) is not None:
                raise no_effect(name, "has no effect on a drawing, whose settings are the tool's")
        text, addresses = drawing_inputs(list(self._turns()), tool)
        self._edits = bool(addresses)
        settings = {name: value for name, value in tool if name in ImageRequest.model_fields}
        self._drawing = ImageRequest(prompt=text, stream=body.stream, **settings)
        job = draw_request(self._drawing, self._service, self._http_request)
        if not addresses:
            return job
        self._service.check_limit("input", len(addresses), self._service.config.limits.images, "images")
        images = [read_image(address, self._service) for address in addresses]
        return replace(job, images=images, image_form=tool.image_form or "input")

    def _turns(self) -> Iterator[Turn]:
        if self._request.instructions is not None:
            yield "system", [("text", self._request.instructions)]
        items = self._request.input
        if isinstance(items, str):
            yield "user", [("text", items)]
            return
        for item in items:
            if isinstance(item, ImageCallItem):
                yield "assistant", [("image", f"data:image/png;base64,{item.result}")]
            elif isinstance(item.content, str):
                yield item.role, [("text", item.content)]
            else:
                yield item.role, [*_contents(item.content)]

    def body(self, result: Answer | Drawings | None) -> ResponseBody:
        """Return the answer; without a result, one that is in progress."""
        request = self._request
        settings = {} if result is None else applied_settings(result.settings)
        is_cut = isinstance(result, Answer) and result.was_cut
        return ResponseBody(
            id=self._id,
            created_at=self._created,
            completed_at=None if result is None else int(time.time()),
            status="in_progress" if result is None else "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=self._service.name,
            output=[] if result is None else [self._item(result)],
            temperature=settings.get("temperature"),
            top_p=settings.get("top_p"),
            tool_choice=request.model_dump(mode="json")["tool_choice"] or "auto",
            tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()],
            usage=None if result is None else _usage(result),
            settings=settings,
        )

    def _item(self, result: Answer | Drawings) -> dict[str, Any]:
        if isinstance(result, Answer):
            status = "incomplete" if result.was_cut else "completed"
            return self._message(status, [_text(str(result))])
        drawing, image = self._drawing, result[0]
        output_format = drawing.output_format or "png"
        return self._image_call("completed") | {
            "result": encode_image(image, output_format, drawing.output_compression),
            "output_format": output_format,
            "size": image_size(image),
            "action": "edit" if self._edits else "generate",
            "background": "opaque",
            "quality": "auto",
            "revised_prompt": drawing.prompt,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _image_call(self, status: str) -> dict[str, Any]:
        return {"id": self._item_id, "type": "image_generation_call", "status": status, "result": None}

    def _event(self, name: str, **fields: Any) -> str:
        data = {"type": f"response.{name}", "sequence_number": next(self._numbers), **fields}
        return event_line(data, name=data["type"])

    async def events(self, group: JobGroup) -> AsyncIterator[str]:
        """Yield the events of a stream, from ``response.created`` to the answer as a whole."""
        begun = self.body(None).model_dump()
        yield self._event("created", response=begun)
        yield self._event("in_progress", response=begun)
        item = {"item_id": self._item_id, "output_index": 0}
        lines = self._draw_events(group, item) if self.tool else self._text_events(group, item)
        async for line in lines:
            yield line

    async def _text_events(self, group: JobGroup, item: Mapping[str, Any]) -> AsyncIterator[str]:
        part, trimmer = {**item, "content_index": 0}, EdgeTrimmer()
        yield self._event("output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("content_part.added", **part, part=_text(""))
        async for _, event in group.events():
            if isinstance(event, TextDelta) and (text := trimmer.push(event.text)):
                yield self._event("output_text.delta", **part, delta=text, logprobs=[])
            elif isinstance(event, Finished) and isinstance(event.result, Answer):
                text, body = str(event.result), self.body(event.result)
                yield self._event("output_text.done", **part, text=text, logprobs=[])
                yield self._event("content_part.done", **part, part=_text(text))
                yield self._event("output_item.done", output_index=0, item=body.output[0])
                yield self._event(body.status, response=body.model_dump())

    async def _draw_events(self, group: JobGroup, item: Mapping[str, Any]) -> AsyncIterator[str]:
        drawing = self._drawing
        output_format = drawing.output_format or "png"
        yield self._event("output_item.added", output_index=0, item=self._image_call("in_progress"))
        yield self._event("image_generation_call.in_progress", **item)
        yield self._event("image_generation_call.generating", **item)
        async for _, event in group.events():
            if isinstance(event, PartialImage):
                quality = drawing.output_compression
                data = await asyncio.to_thread(encode_image, event.image, output_format, quality)
                fields = {"partial_image_b64": data, "partial_image_index": event.number}
                yield self._event("image_generation_call.partial_image", **item, **fields)
            elif isinstance(event, Finished):
                body = await asyncio.to_thread(self.body, event.result)
                yield self._event("image_generation_call.completed", **item)
                yield self._event("output_item.done", output_index=0, item=body.output[0])
                yield self._event("completed", response=body.model_dump())


def _contents(content: list[Any]) -> Iterator[tuple[str, str]]:
    for part in content:
        yield ("text", part.text) if isinstance(part, InputText) else ("image", part.image_url)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(result: Answer | Drawings) -> dict[str, Any]:
    usage = result.usage if isinstance(result, Answer) else result.usage[0]
    output = usage.completion_tokens + usage.image_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0, "image_tokens": usage.image_tokens},
        "total_tokens": usage.prompt_tokens + output,
    }
