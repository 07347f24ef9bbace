"""Server-sent events: the form in which OpenAI's API streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from janus_modular.server.api_errors import api_error
from janus_modular.server.service import JobGroup

END = "data: [DONE]\n\n"
"""The last line of streams of chat completions."""

KEEP_ALIVE = 15.0
"""Seconds without an event, after which a comment is sent."""

COMMENT = ": still working\n\n"
"""What clients ignore."""


class EventStream(StreamingResponse):
    """A stream of events; its jobs are cancelled when the client closes the connection."""

    media_type = "text/event-stream"

    def __init__(self, group: JobGroup, lines: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies pass events on at once
        super().__init__(_with_errors(lines), headers=headers)
        self._group = group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._group.cancel()


def event_line(data: Mapping[str, Any], *, name: str | None = None) -> str:
    """Return one event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


async def _with_errors(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events; an error after the first of them is an event too, for the status was sent before.

    While none comes, comments keep proxies from closing the connection.
    """
    line: asyncio.Future[str] | None = None
    try:
        while True:
            line = line or asyncio.ensure_future(anext(lines))
            if not (await asyncio.wait({line}, timeout=KEEP_ALIVE))[0]:
                yield COMMENT
                continue
            finished, line = line, None
            yield finished.result()
    except StopAsyncIteration:
        return
    except Exception as error:  # every one is answered
        yield event_line(api_error(error).body, name="error")
    finally:
        if line is not None:
            line.cancel()
