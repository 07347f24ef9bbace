"""What the routes share: the engine, the limits of requests, and the jobs that a request consists of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import Scope

from janus_modular.answers import Answer, Drawings
from janus_modular.errors import QueueFullError
from janus_modular.server.api_errors import ApiError, invalid
from janus_modular.server.metrics import Metrics
from janus_modular.server.settings import ServerConfig
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Event, Finished, Job

if TYPE_CHECKING:
    from janus_modular.janus import Janus
    from janus_modular.server.traces import RequestSpans, Traces

RESERVED = ("numbers", "first", "seed")
"""Settings of samplers that requests set by ``n`` and ``seed``."""

RECORD, REQUEST_ID = "janus_modular.record", "janus_modular.request_id"
"""The keys of the log's record, and of the id, in a request's scope."""


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


class JobGroup:
    """The jobs of one HTTP request, which are cancelled together."""

    def __init__(self, jobs: Sequence[Job], metrics: Metrics) -> None:
        self.jobs = list(jobs)
        self.spans: list[RequestSpans] = []  # of the jobs; none without traces
        self._metrics = metrics

    def cancel(self) -> None:
        """Cancel what is not done; its rows become free at once."""
        for job in self.jobs:
            job.cancel()
        for spans in self.spans:
            spans.fail("cancelled")

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (number of the job, event) as events come; raise the error of the first job that fails."""
        events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

        async def forward(index: int, job: Job) -> None:
            try:
                async for event in job:
                    events.put_nowait((index, event))
            except Exception as error:  # raised again below, where the request is answered
                events.put_nowait((index, error))

        tasks = [asyncio.create_task(forward(index, job)) for index, job in enumerate(self.jobs)]
        running = len(tasks)
        try:
            while running:
                index, event = await events.get()
                if isinstance(event, Exception):
                    for spans in self.spans[index : index + 1]:
                        spans.fail(type(event).__name__)
                    raise event
                if isinstance(event, Finished):
                    self._metrics.observe(event)
                    for spans in self.spans[index : index + 1]:
                        spans.finish(event)
                    running -= 1
                yield index, event
        finally:
            for task in tasks:
                task.cancel()

    async def results(self, request: Request) -> list[Any]:
        """Wait for all jobs; return their answers or drawings.

        Raises:
            ClientGoneError: the client closed its connection; the jobs are cancelled.
        """
        work = asyncio.create_task(self._results())
        watcher = asyncio.create_task(_disconnection(request))
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGoneError
            return work.result()
        finally:
            watcher.cancel()
            work.cancel()
            self.cancel()

    async def _results(self) -> list[Any]:
        results: dict[int, Answer | Drawings] = {}
        async for index, event in self.events():
            if isinstance(event, Finished):
                results[index] = event.result
        return [results[index] for index in range(len(self.jobs))]


@dataclass
class Service:
    """A model that is served."""

    janus: Janus
    engine: Engine
    config: ServerConfig
    name: str
    keys: Sequence[str] = ()
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    is_ready: bool = False
    traces: Traces | None = None  # None: no spans are made

    def check_model(self, name: str | None) -> None:
        """Check the name of the model in a request.

        Raises:
            ApiError: another model is served.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404, f"model: the server has only '{self.name}'.", param="model", code="model_not_found"
            )

    def check_limit(self, name: str, value: int, limit: int, unit: str) -> None:
        """Check a quantity of a request.

        Raises:
            ApiError: it is above the server's limit.
        """
        if value > limit:
            raise invalid(
                f"{name}: {value:,} {unit}; this server takes {limit:,} at most.",
                param=name,
                code="limit_exceeded",
            )

    async def submit(self, request: Request, jobs: Sequence[AnswerRequest | DrawRequest]) -> JobGroup:
        """Submit the jobs of a request, all or none; prompts are prepared in a thread.

        Raises:
            ApiError: the queue is full, or holds fewer than the request has.
            JanusError: a prompt or a setting is invalid.
        """
        if len(jobs) > self.config.queue:  # trying again would never help
            raise invalid(
                f"n: {len(jobs)} answers; this server's queue takes {self.config.queue} at most.",
                param="n",
                code="limit_exceeded",
            )
        group = JobGroup([], self.metrics)
        work = asyncio.create_task(asyncio.to_thread(self._submit_all, group, jobs, request))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:  # the thread goes on: cancel what it submits
            work.add_done_callback(lambda _: group.cancel())
            raise
        except QueueFullError as error:
            self.metrics.refused.inc()
            seconds = str(max(1, round(error.retry_after)))
            raise ApiError(429, str(error), code="queue_full", headers={"retry-after": seconds}) from error
        log_record(request.scope)["jobs"] = len(group.jobs)
        return group

    def _submit_all(
        self, group: JobGroup, jobs: Sequence[AnswerRequest | DrawRequest], request: Request
    ) -> None:
        try:
            for job in jobs:
                if self.traces is not None:
                    group.spans.append(self.traces.begin(job, request_id(request), request.headers))
                group.jobs.append(self.engine.submit(job))
                for spans in group.spans[-1:]:
                    spans.submitted()
        except BaseException as error:
            for spans in group.spans[-1:]:
                spans.fail(type(error).__name__)
            group.cancel()
            raise


def merged_settings(named: Mapping[str, Any], extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a sampler's settings from the fields of a request and from its ``settings``.

    Raises:
        ApiError: a setting is given twice, or is set by other fields.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    for name, value in (extra or {}).items():
        if name in RESERVED or name in settings:
            reason = "is a field of the request" if name == "seed" or name in settings else "is set by n"
            raise invalid(f"settings.{name}: {reason}. Leave it out of settings.", param=f"settings.{name}")
        settings[name] = value
    return settings


def applied_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's settings as answers report them: without numbers, which follow from n."""
    return {name: value for name, value in settings.items() if name not in ("numbers", "first")}


def request_id(request: Request) -> str:
    """Return the id of a request: its header x-request-id, or a random one."""
    return str(request.scope[REQUEST_ID])


def seed_of(request: Request) -> int:
    """Return the seed of a request that has none: by its id, so that it is the same if it is sent again."""
    return int.from_bytes(sha256(request_id(request).encode()).digest()[:4]) >> 1


def log_record(scope: Scope) -> dict[str, Any]:
    """Return the fields that the log's line of a request has beside those of all requests."""
    record: dict[str, Any] = scope.setdefault(RECORD, {})
    return record


async def _disconnection(request: Request) -> None:
    with suppress(RuntimeError):  # the server has ended the connection itself
        while (await request.receive())["type"] != "http.disconnect":
            pass
