"""A request between its submission and its end, with the runs that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from janus_modular.serving.jobs import Job
from janus_modular.serving.requests import Finished, Timing
from janus_modular.serving.row_view import RowView
from janus_modular.serving.tasks import Task
from janus_modular.serving.work import Work


class OpenRequest:
    """A request that an engine has taken. Changed by the engine's thread alone."""

    def __init__(self, job: Job, work: Work, steps: Callable[[], int]) -> None:
        """Note when the request was submitted; ``steps`` returns the steps of the batch so far."""
        self.job, self.work, self.steps = job, work, steps
        self.submitted_step = 0  # of the batch
        self.first_steps = 0  # as in `Timing`
        self.submitted = time.monotonic()
        self.started: float | None = None  # seconds after submission, as in `Timing`
        self.first: float | None = None
        self.last: float | None = None
        self.next_run = 0  # the first run that has not begun
        self.tasks: dict[Task, int] = {}  # runs that have begun, and not ended
        self.results: dict[int, Any] = {}  # of runs that have ended
        self.is_done = False

    def seconds(self) -> float:
        """Return the seconds since submission."""
        return time.monotonic() - self.submitted

    def is_late(self) -> bool:
        """Return True if the deadline has passed."""
        deadline = self.job.request.deadline
        return deadline is not None and self.seconds() > deadline

    def run(self, number: int) -> Callable[[RowView], Any]:
        """Return what the task of a run does."""
        return lambda view: self.work.run(number, view, self.job.emit, self._note_token)

    def _note_token(self) -> None:
        self.last = self.seconds()
        if self.first is None:
            self.first, self.first_steps = self.last, self.steps() - self.submitted_step

    def finish(self, error: BaseException | None) -> None:
        """End the job, with the results of the runs or an error."""
        if error is None:
            try:
                result = self.work.result([self.results[number] for number in range(self.work.runs)])
            except Exception as raised:
                error = raised
        if error is not None:
            self.job.fail(error)
            return
        now = self.seconds()
        first, last = (now if time is None else time for time in (self.first, self.last))
        timing = Timing(self.started or 0.0, first, last, now, self.first_steps)
        self.job.emit(Finished(result, timing))
