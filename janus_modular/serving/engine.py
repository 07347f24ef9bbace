"""The engine: answers and drawings of many callers over one model."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from janus_modular.errors import DeadlineError, QueueFullError, RequestCancelledError
from janus_modular.serving.jobs import Clock, Job
from janus_modular.serving.requests import AnswerRequest, DrawRequest, Finished, Progress, TextDelta, Timing
from janus_modular.serving.statistics import EngineStats

if TYPE_CHECKING:
    from janus_modular.janus import Janus


class Engine:
    """Runs requests over one model, in a thread of its own. Close it, or use it in a ``with`` block."""

    def __init__(self, janus: Janus, rows: int = 8, *, queue_size: int = 256) -> None:
        """Start an engine of ``rows`` rows; ``queue_size`` is how many requests may wait for rows."""
        self.janus = janus
        self.rows = rows
        self.queue_size = queue_size
        self._queue: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._cancelled: set[str] = set()
        self._clocks: dict[str, Clock] = {}
        self._stats = EngineStats(0, 0, rows, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0)
        self._thread = threading.Thread(target=self._work, name="janus-engine", daemon=True)
        self._thread.start()

    def submit(self, request: AnswerRequest | DrawRequest) -> Job:
        """Check a request and queue it; return its job at once.

        Raises:
            PromptError: the prompt or a setting is invalid, or does not fit into the engine's rows.
            QueueFullError: as many requests are waiting as the queue holds.
            ServingError: the engine is closed.
        """
        job = Job(request, request.request_id or uuid4().hex, self._cancel)
        self._clocks[job.request_id] = Clock()
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise QueueFullError(
                f"found {self.queue_size} requests waiting; expected fewer: try again in 1 s.", 1.0
            ) from None
        self._stats = replace(self._stats, waiting=self._queue.qsize())
        return job

    def stats(self) -> EngineStats:
        """Return the requests, rows, steps and times so far."""
        return self._stats

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop; with ``drain`` after all requests are done, or after ``timeout`` seconds of them.

        Other requests are cancelled.
        """
        if not drain:
            while not self._queue.empty():
                job = self._queue.get_nowait()
                if job is not None:
                    job.fail(RequestCancelledError("the engine was closed before the request was done."))
        self._queue.put(None)
        self._thread.join(timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    def _cancel(self, job: Job) -> None:
        self._cancelled.add(job.request_id)

    def _check(self, job: Job) -> None:
        if job.request_id in self._cancelled:
            raise RequestCancelledError(f"request {job.request_id} was cancelled.")
        deadline = job.request.deadline
        if deadline is not None and self._clocks[job.request_id]() > deadline:
            raise DeadlineError(f"request {job.request_id} was not done after {deadline} s.")

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._stats = replace(self._stats, running=1, waiting=self._queue.qsize())
            try:
                self._check(job)
                self._run(job)
            except BaseException as error:
                job.fail(error)
            self._stats = replace(self._stats, running=0)

    def _run(self, job: Job) -> None:
        clock, request = self._clocks.pop(job.request_id), job.request
        self._clocks[job.request_id] = clock
        started, first = clock(), 0.0
        if isinstance(request, AnswerRequest):
            named: dict[str, Any] = {"seed": request.seed, "max_tokens": request.max_new_tokens}
            settings = {k: v for k, v in named.items() if v is not None} | dict(request.settings)
            batch = self.janus.answers([(request.prompt, request.images)], stop=request.stop, **settings)
            for _, text in batch:
                first = first or clock()
                job.emit(TextDelta(text))
                self._check(job)
            job.emit(Finished(batch.answers[0], Timing(started, first, clock())))
            return

        def on_progress(done: int, total: int) -> None:
            nonlocal first
            first = first or clock()
            job.emit(Progress(done, total))
            self._check(job)

        drawings = self.janus.draw(
            request.prompt,
            request.n,
            seed=request.seed,
            guidance=request.guidance,
            temperature=request.temperature,
            progress=on_progress,
            **request.settings,
        )
        job.emit(Finished(drawings, Timing(started, first, clock())))
