"""The running batch: tasks over the rows of one session, which advance together, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from janus_modular.errors import CheckError, PromptError
from janus_modular.protocols import BatchState, Plan, Scheduler, SharedSession, TaskState
from janus_modular.serving.graph_runner import GraphRunner
from janus_modular.serving.reading import Reader
from janus_modular.serving.row_pool import RowPool
from janus_modular.serving.row_view import (
    FeedCall,
    ReadCall,
    RowView,
    RunCall,
    SharedTensor,
    Vectors,
    gather,
    sources_and_rows,
)
from janus_modular.serving.tasks import Mode, Task


class Batch:
    """Tasks that share a session. Not thread-safe: an engine calls it in its own thread.

    Each `advance` reads parts of prompts, runs the graphs that samplers ask for, those of one name together,
    and then makes one step of the backbone over the rows of all tasks.
    """

    def __init__(
        self,
        session: SharedSession,
        rows: int,
        scheduler: Scheduler,
        *,
        keeps_prompts: bool,
        on_end: Callable[[Task], None],
        on_start: Callable[[Task], None] = lambda task: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take a session of ``rows`` rows.

        ``on_start`` gets each task that gets rows, ``on_end`` each that has ended by itself. A task that is
        alone goes on without returning from `advance` until ``is_interrupted``.
        """
        self.session, self.scheduler = session, scheduler
        self.on_start, self.on_end, self.is_interrupted = on_start, on_end, is_interrupted
        self.pool = RowPool(session, rows, keeps_prompts=keeps_prompts)
        self.tasks: dict[int, Task] = {}  # that have not ended, in the order of submission
        self.reader = Reader(session, self.pool, lambda task, error: self._resume(task, error=error))
        self.steps = 0
        self.graphs = GraphRunner(session)

    def task(self, mode: Mode, max_seq_len: int, work: Callable[[RowView], Any]) -> Task:
        """Return a task that calls ``work`` with its session, of ``max_seq_len`` positions a row."""
        return Task(
            mode, self.session, max_seq_len, work, cut_back=self.pool.cut, go_on_alone=self._go_on_alone
        )

    def start(self, task: Task) -> None:
        """Run a task up to the first call that needs rows."""
        self.tasks[task.number] = task
        self._resume(task)
        self._run_graphs()

    def remove(self, task: Task) -> None:
        """End a task: its rows are free at once."""
        task.stop()
        self._forget(task)

    def advance(self) -> bool:
        """Read parts of prompts and make one step; return False if there was nothing to do.

        Raises:
            CheckError: the scheduler's plan is impossible, or admits nothing though nothing runs.
        """
        before = self.steps, self.reader.positions
        self._read()
        self._step()
        return (self.steps, self.reader.positions) != before

    @property
    def waiting(self) -> list[Task]:
        """The tasks that need rows, oldest first."""
        return [task for task in self.tasks.values() if _needs_rows(task)]

    def _read(self) -> None:
        """Assign rows and read prompts, as the scheduler plans."""
        waiting, reading = self.waiting, list(self.reader.readings)
        if not waiting and not reading:
            return
        plan = self.scheduler.plan(self._state(waiting, reading))
        self._check(plan, waiting)
        admitted = [self.tasks[number] for number in plan.admit]
        for task in admitted:
            self.pool.release(task)
            self.pool.assign(task)
            self.on_start(task)
        self.reader.begin(admitted)
        positions = {
            self.tasks[number]: count for number, count in plan.read.items() if number in self.tasks and count
        }
        self.graphs.copy_inputs()
        for task, states in self.reader.read(positions):
            self._resume(task, states)
        self._run_graphs()

    def _state(self, waiting: Sequence[Task], reading: Sequence[Task]) -> BatchState:
        def states(tasks: Sequence[Task]) -> list[TaskState]:
            return [TaskState(task.number, task.mode, task.view.count, self._unread(task)) for task in tasks]

        idle = {*waiting, *reading}
        return BatchState(
            rows=len(self.pool.owners),
            free_rows=len(self.pool.free),
            waiting=states(waiting),
            reading=states(reading),
            running=states([task for task in self.tasks.values() if task not in idle]),
        )

    def _unread(self, task: Task) -> int:
        if task in self.reader.readings:
            return self.reader.unread(task)
        return max(map(len, task.call.prompts)) if isinstance(task.call, ReadCall) else 0

    def _check(self, plan: Plan, waiting: Sequence[Task]) -> None:
        by_number = {task.number: task for task in waiting}
        needed = sum(by_number[number].view.count for number in plan.admit if number in by_number)
        free = len(self.pool.free) + sum(len(task.view.rows) for task in waiting)
        if len({*plan.admit} & {*by_number}) != len(plan.admit) or needed > free:
            raise CheckError(
                f"{type(self.scheduler).__name__}: found a plan that admits the tasks {list(plan.admit)} with"
                f" {needed} rows; expected some of {list(by_number)}, each once, and {free} rows at most."
            )
        if not plan.admit and not any(plan.read.values()) and not self._feeding():
            raise CheckError(
                f"{type(self.scheduler).__name__}: found a plan that does nothing while {len(waiting)} tasks"
                " wait and none runs; expected a task to be admitted, or positions to be read."
            )

    def _feeding(self) -> list[Task]:
        return [task for task in self.tasks.values() if isinstance(task.call, FeedCall)]

    def _step(self) -> None:
        """Make one step of the backbone for all tasks that feed as many positions at once."""
        by_length: dict[int, list[Task]] = {}
        for task in self._feeding():
            assert isinstance(task.call, FeedCall)
            by_length.setdefault(task.call.x.shape[1], []).append(task)
        if len(by_length) > 1:
            self.graphs.copy_inputs()
        for num_positions, tasks in by_length.items():
            self._feed(tasks, num_positions)
        self.graphs.forget_inputs()
        if by_length:
            self.steps += 1
            self._run_graphs()

    def _feed(self, tasks: Sequence[Task], num_positions: int) -> None:
        """Feed some tasks' rows, and resume the tasks with the states that follow."""
        rows = [row for task in tasks for row in task.view.rows]
        calls = [task.call for task in tasks]
        top = max(rows) + 1
        order, counts = np.zeros((top, num_positions), np.int64), np.zeros(top, np.int64)
        order[rows] = np.arange(len(rows) * num_positions).reshape(-1, num_positions)
        counts[rows] = np.concatenate([call.counts for call in calls if isinstance(call, FeedCall)])
        tensors = [call.x for call in calls if isinstance(call, FeedCall)]
        if num_positions == 1:
            x = self.session.expand(gather(self.session, tensors, order[:, 0]))
        else:
            sources, vectors = sources_and_rows(tensors)
            x = self.session.take(sources, vectors[order])
        try:
            hidden = self.session.extend_rows(x, counts, 0)
        except Exception as error:  # nothing was written: find out whose error it is
            self._feed_each(tasks, x, counts, error)
            return
        self._resume_all(tasks, hidden)

    def _feed_each(self, tasks: Sequence[Task], x: Any, counts: Any, error: Exception) -> None:
        """Feed the rows of each task in turn, after an error of all together."""
        if len(tasks) == 1:
            self._resume(tasks[0], error=error)
            return
        for task in tasks:
            of_task = np.zeros_like(counts)
            of_task[task.view.rows] = counts[task.view.rows]
            try:
                hidden = self.session.extend_rows(x, of_task, 0)
                copied = self.session.take(hidden, np.arange(prod(x.shape[:2])).reshape(x.shape[:2]))
            except Exception as error_of_task:
                self._resume(task, error=error_of_task)
            else:
                self._resume_all([task], copied)

    def _resume_all(self, tasks: Sequence[Task], hidden: Any) -> None:
        """Resume tasks with their rows of states (rows, W, D)."""
        num_positions = hidden.shape[1]
        source = SharedTensor(self.session.squeeze(hidden) if num_positions == 1 else hidden)
        for task in tasks:
            indices = np.array(task.view.rows)[:, None] * num_positions + np.arange(num_positions)
            self._resume(task, Vectors(source, indices, self.session.hidden_size))

    def _run_graphs(self) -> None:
        """Run graphs until no task waits for any; then nothing needs the states of the last step anymore."""
        while calls := {task: task.call for task in self.tasks.values() if isinstance(task.call, RunCall)}:
            for task, result, error in self.graphs.run(calls):
                self._resume(task, result, error)

    def _resume(self, task: Task, value: Any = None, error: Exception | None = None) -> None:
        """Resume a task until its next call or its end."""
        if task.is_done:  # removed meanwhile
            return
        rows = task.view.rows
        task.view.is_alone = bool(rows) and len(self.tasks) == 1 and rows == list(range(len(rows)))
        if error is not None:
            task.throw(error)
        else:
            task.resume(value)
        if isinstance(task.call, ReadCall) and task.view.count > len(self.pool.owners):
            task.throw(
                PromptError(
                    f"found a request that needs {task.view.count} rows at a time; the engine has"
                    f" {len(self.pool.owners)}: open it with more (rows={task.view.count})."
                )
            )
        if task.is_done:
            self._forget(task)
            self.on_end(task)
        elif isinstance(task.call, ReadCall) and not _needs_rows(task):  # more prompts, into rows that it has
            self.reader.begin([task])

    def _go_on_alone(self) -> bool:
        """Count a step of a task that is alone, unless others want to take part."""
        if self.is_interrupted():
            return False
        self.steps += 1
        return True

    def _forget(self, task: Task) -> None:
        self.pool.release(task)
        self.reader.forget(task)
        self.tasks.pop(task.number, None)


def _needs_rows(task: Task) -> bool:
    """Return True if a task waits to read prompts, and has other rows than it needs."""
    return isinstance(task.call, ReadCall) and len(task.view.rows) != task.view.count
