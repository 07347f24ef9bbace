"""A submitted request: its events, for threads and for asyncio, and its result."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress

from janus_modular.answers import Answer, Drawings
from janus_modular.errors import DeadlineError
from janus_modular.serving.requests import AnswerRequest, DrawRequest, Event, Finished


class Job:
    """A submitted request. Iterating over it (``for`` or ``async for``) yields its events.

    Each iteration yields all events from the first to `Finished`, or raises the request's error at the end.
    All methods are thread-safe.
    """

    def __init__(
        self, request: AnswerRequest | DrawRequest, request_id: str, cancel: Callable[[Job], None]
    ) -> None:
        """Make a job; ``cancel`` is the engine's, and is called at most until the job has ended."""
        self.request, self.request_id = request, request_id
        self._cancel = cancel
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """True once the request has ended, with a result or an error."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Cancel the request; its rows are free before the next step. No effect if the request has ended."""
        if not self.done:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> Answer | Drawings:
        """Wait for the end of the request; return its answer or drawings.

        Raises:
            DeadlineError: the request has not ended after ``timeout`` seconds; it continues.
            JanusError: the request failed or was cancelled.
        """
        if not self._ended.wait(timeout):
            raise DeadlineError(
                f"request {self.request_id}: found no result after {timeout} s; it goes on. Wait longer, or"
                " call cancel()."
            )
        if self._error is not None:
            raise self._error
        last = self._events[-1]
        assert isinstance(last, Finished)
        return last.result

    def __iter__(self) -> Iterator[Event]:
        index = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._events) > index or self.done)
            yield from self._events[index : (index := len(self._events))]
            if self.done and index == len(self._events):
                if self._error is not None:
                    raise self._error
                return

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        loop, changed, index = asyncio.get_running_loop(), asyncio.Event(), 0

        def listener() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                changed.clear()
                for event in self._events[index : (index := len(self._events))]:
                    yield event
                if self.done and index == len(self._events):
                    if self._error is not None:
                        raise self._error
                    return
                if index == len(self._events) and not self.done:
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def emit(self, event: Event) -> None:
        """Add an event; called by the engine."""
        with self._changed:
            self._events.append(event)
            if isinstance(event, Finished):
                self._ended.set()
            self._notify()

    def fail(self, error: BaseException) -> None:
        """End the request with an error; called by the engine."""
        with self._changed:
            self._error = error
            self._ended.set()
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()
