"""Runs of samplers that wait inside their calls of a session: each in a greenlet of the engine's thread.

A sampler is an ordinary generator function that calls a session. A call suspends its greenlet, and the engine
resumes it with the result, or with an error that the call raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

from janus_modular.errors import reporting_missing_packages
from janus_modular.protocols import SharedSession
from janus_modular.serving.row_view import Call, RowView

with reporting_missing_packages("serving"):
    from greenlet import GreenletExit, getcurrent, greenlet

Mode = Literal["answer", "draw"]

_numbers = itertools.count()


class Task:
    """One run of a sampler: an answer, or one image of a drawing. Rows are assigned to it as a whole."""

    def __init__(
        self,
        mode: Mode,
        session: SharedSession,
        max_seq_len: int,
        work: Callable[[RowView], Any],
        *,
        cut_back: Callable[[RowView], None],
        go_on_alone: Callable[[], bool],
    ) -> None:
        """Prepare to call ``work`` with a view of the session; `resume` begins."""
        self.mode: Mode = mode
        self.number = next(_numbers)
        self.view = RowView(session, max_seq_len, self._wait_for, cut_back, go_on_alone)
        self.call: Call | None = None  # that the sampler waits for
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self._greenlet = greenlet(lambda _: work(self.view))

    def resume(self, value: Any = None) -> None:
        """Go on with the result of the call; return once the sampler makes the next one, or has ended."""
        self._switch(lambda: self._greenlet.switch(value))

    def throw(self, error: BaseException) -> None:
        """Raise an error in the call that the sampler waits for."""
        self._switch(lambda: self._greenlet.throw(error))

    def stop(self) -> None:
        """End the run: its ``finally`` blocks run, and calls in these raise."""
        self.call, self.is_done = None, True
        if self._greenlet:  # it has begun, and has not ended
            self._greenlet.parent = getcurrent()
            self._greenlet.throw(GreenletExit)

    def _switch(self, go_on: Callable[[], Any]) -> None:
        self.call = None
        self._greenlet.parent = getcurrent()
        try:
            result = go_on()
        except BaseException as error:
            self.error, self.is_done = error, True
            return
        if self._greenlet.dead:
            self.result, self.is_done = result, True
        else:
            self.call = result

    def _wait_for(self, call: Call) -> Any:
        if self.is_done:
            raise GreenletExit
        return self._greenlet.parent.switch(call)
