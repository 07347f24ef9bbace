"""The engine: answers and drawings of many callers in one running batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from janus_modular import arguments
from janus_modular.components import Builder
from janus_modular.config import resolve
from janus_modular.errors import (
    ConfigError,
    DeadlineError,
    JanusError,
    JournalError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    ServingError,
)
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.plugins import Plugins
from janus_modular.protocols import Fingerprinted, Scheduler, SharedSession
from janus_modular.serving.batch import Batch
from janus_modular.serving.drawing_record import DrawingRecord
from janus_modular.serving.drawn_codes import CodeGraphs
from janus_modular.serving.jobs import Job
from janus_modular.serving.journal import Journal
from janus_modular.serving.open_requests import OpenRequest
from janus_modular.serving.requests import AnswerRequest, DrawRequest
from janus_modular.serving.statistics import EngineStats
from janus_modular.serving.tasks import Task
from janus_modular.serving.work import DrawWork, work_for

if TYPE_CHECKING:
    from janus_modular.janus import Janus

MAX_SEQ_LEN = 2048
"""Default positions of a row, where the model's context has more: memory is allocated for them."""

log = logging.getLogger(__name__)


@dataclass
class SchedulerChoice:
    """The config of an engine's scheduler."""

    scheduler: ComponentSpec = component("schedulers")


def build_scheduler(scheduler: str | Mapping[str, Any], plugins: Plugins) -> Scheduler:
    """Build a scheduler: a registered name, or ``{"name": ..., **options}``.

    Raises:
        ConfigError, PluginError: there is none of this name, or an option is unknown or out of its range.
    """
    options = {"name": scheduler} if isinstance(scheduler, str) else dict(scheduler)
    spec = resolve({"scheduler": options}, SchedulerChoice, plugins).scheduler
    built: Scheduler = Builder(plugins)(spec)
    return built


class Engine:
    """Computes requests with continuous batching, in its own thread. Close it, or use a ``with`` block.

    The result of a request is that of `janus_modular.Janus.chat` or `draw`. All methods are thread-safe.
    """

    def __init__(
        self,
        janus: Janus,
        rows: int = 8,
        *,
        max_seq_len: int | None = None,
        queue_size: int = 256,
        scheduler: str | Mapping[str, Any] = "fair",
        prefix_cache: bool = True,
        journal: str | Path | None = None,
    ) -> None:
        """Open a session and start the engine's thread.

        ``rows``: batch rows; an answer takes one, an image with guidance two.
        ``max_seq_len``: positions per row; default: the model's context, at most 2048. The KV cache is
        allocated for ``rows`` times ``max_seq_len`` positions.
        ``queue_size``: maximum number of requests that wait for rows.
        ``scheduler``: a registered name, or ``{"name": "fair", "chunk": 32}``.
        ``prefix_cache``: reuse the KV cache of earlier prompts that begin with the same tokens and images.
        ``journal``: a folder for the codes of unfinished drawings; an engine that is started with the journal
        of a killed engine continues its drawings (attribute `resumed`, a list of jobs).

        Raises:
            ConfigError: an option is out of range, or the runtime's sessions cannot be shared.
            JournalError: the journal cannot be read, or another engine uses it.
        """
        self.janus = janus
        self.rows = arguments.count(rows, "rows")
        self.queue_size = arguments.count(queue_size, "queue_size")
        default = min(janus.runtime.context, MAX_SEQ_LEN)
        self.max_seq_len = default if max_seq_len is None else arguments.count(max_seq_len, "max_seq_len")
        session = janus.runtime.open(self.max_seq_len, self.rows)
        if not isinstance(session, SharedSession):
            raise ConfigError(
                f"{type(session).__name__}: found a session without extend_rows; expected a class derived"
                " from janus_modular.BaseSession, whose rows an engine can share."
            )
        self.session = session
        self._code_graphs = CodeGraphs.of(session.signatures)
        self._batch = Batch(
            session,
            self.rows,
            build_scheduler(scheduler, janus.plugins),
            keeps_prompts=prefix_cache and not session.has_states,  # which are not known at a prompt's end
            on_start=self._on_start,
            on_end=self._on_end,
            is_interrupted=self._is_interrupted,
        )
        self._changed = threading.Condition()  # guards what other threads change: the next five
        self._incoming: deque[OpenRequest] = deque()
        self._cancelled: list[OpenRequest] = []
        self._requests: dict[str, OpenRequest] = {}  # that have not ended, by id
        self._waiting = 0  # requests without rows
        self._closing = False
        self._open: list[OpenRequest] = []  # of the engine's thread, like all below
        self._of_task: dict[int, OpenRequest] = {}
        self._counts = dict.fromkeys(("answer", "draw", "failed", "cancelled", "started", "continued"), 0)
        self._queue_seconds = 0.0
        self._journal = None
        if journal is not None:
            runtime = janus.runtime
            model = runtime.fingerprint() if isinstance(runtime, Fingerprinted) else None
            self._journal = Journal(journal, model)
        self.resumed = [] if self._journal is None else self._resume_all(self._journal)  # jobs
        self._thread = threading.Thread(target=self._work, name="janus-engine", daemon=True)
        self._thread.start()

    def submit(self, request: AnswerRequest | DrawRequest) -> Job:
        """Check and queue a request; return its job without waiting for the result.

        The prompt is tokenized, and images are read and resized, in the caller's thread.

        Raises:
            PromptError: the prompt or a setting is invalid; the request does not fit into a row; or another
                running request has the same id.
            QueueFullError: ``queue_size`` requests are waiting.
            ServingError: the engine is closed.
        """
        work = work_for(self.janus, request, self.max_seq_len, self._code_graphs)
        job = Job(request, request.request_id or uuid4().hex, self._cancel)
        opened = OpenRequest(job, work, lambda: self._batch.steps)
        with self._changed:
            if self._journal is not None and (before := self._requests.get(job.request_id)):
                self._journal.check_same(before.job.request, request)
                return before.job
            if self._closing:
                raise ServingError("the engine is closed: open another, or try another server.")
            if job.request_id in self._requests:
                raise PromptError(
                    f"request_id: found {job.request_id!r}, which is running; expected another."
                )
            if self._waiting >= self.queue_size:
                seconds = self._seconds_for_a_request()
                raise QueueFullError(
                    f"the queue is full: found {self._waiting} requests that wait for rows; expected fewer"
                    f" than {self.queue_size}. Try again in {seconds:.0f} s.",
                    seconds,
                )
            if self._journal is not None and isinstance(work, DrawWork):
                self._record(work, self._journal, self._journal.begin(job.request_id, work.request))
            self._requests[job.request_id] = opened
            opened.submitted_step = self._batch.steps
            self._incoming.append(opened)
            self._waiting += 1
            self._changed.notify_all()
        return job

    def _resume_all(self, journal: Journal) -> list[Job]:
        """Queue the open drawings of the journal, the oldest first; on an error, its folder is free again."""
        records = journal.open_records()
        try:
            return [self._resume(journal, record) for record in records]
        except JanusError:
            journal.close()
            raise

    def _resume(self, journal: Journal, record: DrawingRecord) -> Job:
        """Queue a drawing of the journal again.

        Raises:
            JournalError: this model cannot draw it.
        """
        try:
            work = DrawWork(self.janus, record.request, self.max_seq_len, self._code_graphs)
        except JanusError as error:
            raise JournalError(
                f"the journal's file {record.file} holds a drawing that this model refuses: {error} Start the"
                " model that the journal is of, or choose another folder."
            ) from error
        self._record(work, journal, record)
        opened = OpenRequest(
            Job(record.request, record.request_id, self._cancel), work, lambda: self._batch.steps
        )
        self._requests[record.request_id] = opened
        self._incoming.append(opened)
        self._waiting += 1
        return opened.job

    def _record(self, work: DrawWork, journal: Journal, record: DrawingRecord) -> None:
        work.record_in(record, journal.model)
        self._counts["continued"] += record.count

    def stats(self) -> EngineStats:
        """Return the numbers of requests, rows and steps so far, and the time in the queue, in seconds."""
        batch, counts = self._batch, self._counts
        return EngineStats(
            running=len(self._requests) - self._waiting,
            waiting=self._waiting,
            rows=self.rows,
            answer_rows=batch.pool.in_use("answer"),
            draw_rows=batch.pool.in_use("draw"),
            steps=batch.steps,
            prompt_positions=batch.reader.positions,
            reused_positions=batch.pool.reused_positions,
            answered=counts["answer"],
            drawn=counts["draw"],
            failed=counts["failed"],
            cancelled=counts["cancelled"],
            queue_seconds=self._queue_seconds,
            started=counts["started"],
            continued_codes=counts["continued"],
        )

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop the engine, and wait until its thread has ended.

        ``drain``: first finish all requests, for at most ``timeout`` seconds (None: no limit), then cancel
        the others. False: cancel all requests.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if drain:
                self._changed.wait_for(lambda: not self._requests, timeout)
            self._cancelled += self._requests.values()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    @property
    def is_closed(self) -> bool:
        """True once `close` was called: no request is taken anymore."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """True while the engine's thread runs; without it no request would ever end."""
        return self._thread.is_alive()

    def _seconds_for_a_request(self) -> float:
        """Estimate when a row is free: the mean time in the queue, at least a second."""
        return max(1.0, self._queue_seconds / max(self._counts["started"], 1))

    def _cancel(self, job: Job) -> None:
        with self._changed:
            if opened := self._requests.get(job.request_id):
                self._cancelled.append(opened)
                self._changed.notify_all()

    def _work(self) -> None:
        """Run the batch until the engine is closed and nothing is left."""
        while self._take():
            try:
                for opened in [*self._open]:
                    self._start_runs(opened)
                self._batch.advance()
            except Exception as error:  # of the scheduler, or our own: nothing that was begun can go on
                log.exception("the batch failed; all requests end with this error")
                for opened in [*self._open]:
                    self._end(opened, error)
        self._batch.pool.clear()
        if self._journal is not None:
            self._journal.close()

    def _take(self) -> bool:
        """Wait for something to do; take new requests and end cancelled ones; False: the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._incoming or self._cancelled or self._closing)
            self._open += self._incoming
            self._incoming.clear()
            cancelled, self._cancelled = self._cancelled, []
            if self._closing and not self._requests:
                return False
        for opened in cancelled:
            self._end(opened, RequestCancelledError(f"request {opened.job.request_id} was cancelled."))
        for opened in [opened for opened in self._open if opened.is_late()]:
            seconds = opened.job.request.deadline
            self._end(
                opened,
                DeadlineError(
                    f"request {opened.job.request_id}: found no result after {seconds} s, its deadline."
                    " Allow more time, or ask for less."
                ),
            )
        return True

    def _is_interrupted(self) -> bool:
        """Return True if `_take` has something to do, which must not wait for the end of a task."""
        has_more = any(opened.is_late() or opened.next_run < opened.work.runs for opened in self._open)
        return bool(self._incoming or self._cancelled or self._closing or has_more)

    def _start_runs(self, opened: OpenRequest) -> None:
        """Start runs of a request, as many as can have rows at a time."""
        while not opened.is_done and len(opened.tasks) < self.rows and opened.next_run < opened.work.runs:
            number, opened.next_run = opened.next_run, opened.next_run + 1
            task = self._batch.task(opened.work.mode, opened.work.max_seq_len, opened.run(number))
            opened.tasks[task], self._of_task[task.number] = number, opened
            self._batch.start(task)

    def _on_start(self, task: Task) -> None:
        opened = self._of_task[task.number]
        if opened.started is None:
            opened.started = opened.seconds()
            self._queue_seconds += opened.started
            self._counts["started"] += 1
            with self._changed:
                self._waiting -= 1

    def _on_end(self, task: Task) -> None:
        opened = self._of_task.pop(task.number)
        number = opened.tasks.pop(task)
        if task.error is not None:
            self._end(opened, task.error)
            return
        opened.results[number] = task.result
        if len(opened.results) == opened.work.runs:
            self._end(opened)

    def _end_record(self, opened: OpenRequest, error: BaseException | None) -> None:
        """Finish a drawing's record, or discard it; what closing cancels is kept for the next engine."""
        record = opened.work.record if isinstance(opened.work, DrawWork) else None
        if record is not None and self._journal is not None:
            if error is None:
                self._journal.finish(record)
            elif not self._closing:
                record.discard()

    def _end(self, opened: OpenRequest, error: BaseException | None = None) -> None:
        """End a request with its result, or with an error; free its rows."""
        if opened.is_done:
            return
        opened.is_done = True
        self._end_record(opened, error)
        self._counts[_outcome(opened, error)] += 1
        for task in [*opened.tasks]:
            self._of_task.pop(task.number, None)
            self._batch.remove(task)
        opened.tasks.clear()
        if opened in self._open:
            self._open.remove(opened)
        with self._changed:
            del self._requests[opened.job.request_id]
            if opened in self._incoming:
                self._incoming.remove(opened)
            if opened.started is None:
                self._waiting -= 1
            self._changed.notify_all()
        opened.finish(error)


def _outcome(opened: OpenRequest, error: BaseException | None) -> str:
    if error is None:
        return opened.work.mode
    return "cancelled" if isinstance(error, RequestCancelledError) else "failed"
