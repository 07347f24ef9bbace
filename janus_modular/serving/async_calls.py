"""`chat` and `draw` for asyncio, over an engine that the first call starts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from janus_modular import samplers
from janus_modular.answers import Answer, Drawings
from janus_modular.arguments import ImageForm
from janus_modular.errors import ConfigError
from janus_modular.processing.image_io import ImageSource
from janus_modular.sequence import Message
from janus_modular.serving.jobs import Job
from janus_modular.serving.requests import AnswerRequest, DrawRequest, Finished, TextDelta

if TYPE_CHECKING:
    from janus_modular.serving.engine import Engine

STARTING = threading.Lock()
"""Held while an engine is started, so that two threads do not start one each."""


class AsyncCalls:
    """The asynchronous methods of `janus_modular.Janus`. Cancelling a call frees its rows."""

    _engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine of the asynchronous methods; without `start_engine` it has the default options."""
        with STARTING:
            return self._engine or self._start({})

    def start_engine(self, **options: Any) -> Engine:
        """Start the engine of the asynchronous methods with the options of `janus_modular.serving.Engine`.

        Raises:
            ConfigError: an engine is running: close it first.
        """
        with STARTING:
            if self._engine is not None and not self._engine.is_closed:
                raise ConfigError("found an engine that is running: close it first (janus.engine.close()).")
            return self._start(options)

    def _start(self, options: dict[str, Any]) -> Engine:
        from janus_modular.serving.engine import Engine

        self._engine = Engine(self, **options)  # type: ignore[arg-type]  # this is a Janus
        return self._engine

    async def achat(
        self,
        question: str | Many[Message],
        images: ImageSource | Many[ImageSource] = (),
        *,
        stop: Many[str] = (),
        max_tokens: int | None = None,
        seed: int | None = None,
        deadline: float | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer like `chat`, together with other calls; ``deadline`` in seconds."""
        request = AnswerRequest(question, images, stop, seed, max_tokens, settings, deadline)
        answer: Answer = await self._result(request)
        return answer

    async def astream(
        self,
        question: str | Many[Message],
        images: ImageSource | Many[ImageSource] = (),
        *,
        stop: Many[str] = (),
        max_tokens: int | None = None,
        seed: int | None = None,
        deadline: float | None = None,
        **settings: Any,
    ) -> AsyncIterator[str]:
        """Answer like `achat`; yield the text as it comes."""
        request = AnswerRequest(question, images, stop, seed, max_tokens, settings, deadline)
        job = await self._submit(request)
        try:
            async with aclosing(job.__aiter__()) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        yield event.text
        finally:
            job.cancel()

    async def adraw(
        self,
        prompt: str,
        n: int = 1,
        *,
        images: ImageSource | Many[ImageSource] = (),
        image_form: ImageForm = "input",
        size: int | tuple[int, int] | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        image_guidance: float | None = None,
        seed: int | None = None,
        deadline: float | None = None,
        **settings: Any,
    ) -> Drawings:
        """Draw like `draw`, together with other calls; ``deadline`` in seconds."""
        request = DrawRequest(
            prompt,
            n,
            size=(size, size) if isinstance(size, int) else size,
            seed=seed,
            guidance=guidance,
            temperature=temperature,
            settings=samplers.chosen(settings, image_guidance=image_guidance),
            images=images,
            image_form=image_form,
            deadline=deadline,
        )
        drawings: Drawings = await self._result(request)
        return drawings

    async def _result(self, request: AnswerRequest | DrawRequest) -> Any:
        job = await self._submit(request)
        try:
            async with aclosing(job.__aiter__()) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        return event.result
        finally:
            job.cancel()

    async def _submit(self, request: AnswerRequest | DrawRequest) -> Job:
        """Submit a request in a thread, because its prompt is prepared there."""
        submission = asyncio.ensure_future(asyncio.to_thread(lambda: self.engine.submit(request)))
        try:
            return await asyncio.shield(submission)
        except asyncio.CancelledError:  # the thread goes on
            submission.add_done_callback(_cancel_job)
            raise


def _cancel_job(submission: asyncio.Future[Job]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()
