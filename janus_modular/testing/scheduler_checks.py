"""Checks of schedulers: they plan a simulated batch of tasks, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from janus_modular.protocols import BatchState, Scheduler, TaskState
from janus_modular.testing.check import check_for, ensure

TASKS, ROUNDS = 200, 20_000


@dataclass
class SimulatedTask:
    """A task of the simulation: what a scheduler sees of it, and the steps that remain after its prompt."""

    state: TaskState
    steps: int


class SimulatedBatch:
    """The rows of an engine whose tasks only count positions and steps."""

    def __init__(self, scheduler: Scheduler, rows: int) -> None:
        self.scheduler, self.rows = scheduler, rows
        self.waiting: list[SimulatedTask] = []
        self.active: list[SimulatedTask] = []  # that have rows

    def advance(self) -> None:
        """Carry out a plan, and make a step; fail for a plan that is impossible or does nothing."""
        free = self.rows - sum(task.state.rows for task in self.active)
        reading = [task for task in self.active if task.state.unread]
        running = [task for task in self.active if not task.state.unread]
        state = BatchState(self.rows, free, *map(_states, (self.waiting, reading, running)))
        plan = self.scheduler.plan(state)
        waiting = {task.state.number: task for task in self.waiting}
        admitted = [waiting.get(number) for number in plan.admit]
        needed = sum(task.state.rows for task in admitted if task)
        ensure(
            None not in admitted and len(set(plan.admit)) == len(admitted),
            f"it admits {list(plan.admit)}; expected some of the waiting tasks {list(waiting)}, each once",
        )
        ensure(needed <= free, f"it admits tasks that need {needed} rows; expected {free} at most")
        self.active += [task for task in admitted if task]
        self.waiting = [task for task in self.waiting if task not in self.active]
        readable = {task.state.number: task for task in self.active if task.state.unread}
        ensure(
            plan.read.keys() <= readable.keys() and all(count >= 0 for count in plan.read.values()),
            f"it reads {dict(plan.read)}; expected positions of the tasks {list(readable)}",
        )
        idle = not running and not admitted and not any(plan.read.values())
        ensure(not idle or not self.waiting + reading, "its plan does nothing, and nothing runs")
        for number, count in plan.read.items():
            task = readable[number]
            task.state = replace(task.state, unread=max(0, task.state.unread - count))
        for task in running:
            task.steps -= 1
        self.active = [task for task in self.active if task.steps > 0]


def _states(tasks: Iterable[SimulatedTask]) -> list[TaskState]:
    return [task.state for task in tasks]


def _tasks(rng: np.random.Generator, modes: tuple[str, ...] = ("answer", "draw")) -> Iterator[SimulatedTask]:
    """Yield tasks without end: images take two rows, answers one."""
    number = 0
    while True:
        mode = modes[int(rng.integers(len(modes)))]
        state = TaskState(number, mode, 1 + (mode == "draw"), int(rng.integers(1, 300)))
        yield SimulatedTask(state, int(rng.integers(1, 30)))
        number += 1


@check_for("schedulers")
def check_scheduler_plans(scheduler: Scheduler, rows: int) -> None:
    """Plans are possible, and all tasks that come, in bursts, are done in the end."""
    rng = np.random.default_rng(0)
    batch, coming = SimulatedBatch(scheduler, rows), _tasks(rng)
    remaining = TASKS
    for _ in range(ROUNDS):
        if remaining and rng.random() < 0.3:
            burst = min(remaining, int(rng.integers(1, 20)))
            batch.waiting += [next(coming) for _ in range(burst)]
            remaining -= burst
        batch.advance()
        if not remaining and not batch.waiting and not batch.active:
            return
    ensure(False, f"{len(batch.waiting)} tasks wait after {ROUNDS:,} steps; expected none")


@check_for("schedulers")
def check_scheduler_starves_none(scheduler: Scheduler, rows: int) -> None:
    """A drawing gets rows though answers keep coming, and an answer though drawings do."""
    for mode, other_mode in (("draw", "answer"), ("answer", "draw")):
        batch, coming = SimulatedBatch(scheduler, rows), _tasks(np.random.default_rng(1), (other_mode,))
        single = SimulatedTask(TaskState(-1, mode, 1 + (mode == "draw"), 20), 5)
        for step in range(ROUNDS // 10):
            while len(batch.waiting) < 2 * rows:
                batch.waiting.append(next(coming))
            if step == 50:
                single.state = replace(single.state, number=batch.waiting[-1].state.number)
                batch.waiting[-1] = single
            batch.advance()
            if single in batch.active:
                break
        ensure(single in batch.active, f"a task of the mode {mode} never gets rows while {other_mode}s come")
