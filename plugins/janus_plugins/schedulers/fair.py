"""The scheduler `fair`: neither answers nor drawings keep the others from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from janus_modular import BatchState, ConfigError, Plan, Registry, Scheduler, TaskState, hookimpl

LEAST_ROWS = 3
"""With fewer rows, an image under guidance takes all of them, and none can be reserved."""


@dataclass
class FairConfig:
    """How rows are shared, and how many positions of prompts are read at once."""

    reserved: float = 0.25  # share of the rows that either mode leaves to the other; 0: none
    chunk: int = 128  # positions of prompts before a step, over all rows, while others make steps
    alone: int = 512  # and while nothing else runs

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that are out of range."""
        if not 0 <= self.reserved <= 0.5:
            raise ConfigError(f"reserved: found {self.reserved}; expected a share from 0 to 0.5.")
        for name in ("chunk", "alone"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}: found {value}; expected at least 1 position.")


class FairScheduler:
    """First come, first served in each mode; of both, the mode with fewer rows is next.

    Each mode leaves a share of the rows to the other, so that a chat does not wait for the end of drawings,
    nor drawings for a gap between chats.
    """

    def __init__(self, config: FairConfig) -> None:
        self.config = config

    def plan(self, state: BatchState) -> Plan:
        """Admit tasks in turn, and divide the positions to be read equally among their prompts."""
        admitted = self.admitted(state)
        reading = [*state.reading, *admitted]
        budget = self.config.chunk if state.running else self.config.alone
        return Plan([task.number for task in admitted], divided(reading, budget))

    def admitted(self, state: BatchState) -> list[TaskState]:
        """Return the waiting tasks that get rows now."""
        free, admitted = state.free_rows, list[TaskState]()
        in_use = {"answer": 0, "draw": 0}
        for task in (*state.running, *state.reading):
            in_use[task.mode] += task.rows
        queues = {mode: [task for task in state.waiting if task.mode == mode] for mode in in_use}
        while heads := [queue[0] for queue in queues.values() if queue]:
            heads.sort(key=lambda task: (in_use[task.mode], task.number))
            for task in heads:
                if self._may_have(task, state, in_use, free, heads):
                    break
            else:
                return admitted
            admitted.append(queues[task.mode].pop(0))
            in_use[task.mode] += task.rows
            free -= task.rows
        return admitted

    def _may_have(
        self,
        task: TaskState,
        state: BatchState,
        in_use: Mapping[str, int],
        free: int,
        heads: Sequence[TaskState],
    ) -> bool:
        """Return True if the rows of a task are free, and not reserved for the other mode."""
        if task.rows > free:
            return False
        [other_mode] = {*in_use} - {task.mode}
        reserve = self._reserve(state.rows, other_mode)
        needed = [head.rows for head in heads if head.mode == other_mode and head.number < task.number]
        limit = state.rows - max(reserve, *needed, 0)  # an older task of the other mode gets its rows in time
        is_first = not any(in_use.values())
        return is_first or in_use[task.mode] + task.rows <= max(limit, 0)

    def _reserve(self, rows: int, mode: str) -> int:
        """Return how many rows are left to a mode: for drawings, whole images."""
        if not self.config.reserved or rows < LEAST_ROWS:
            return 0
        share = max(1, int(rows * self.config.reserved))
        return share if mode == "answer" else 2 * ceil(share / 2)


def divided(tasks: Sequence[TaskState], budget: int) -> dict[int, int]:
    """Divide a number of positions equally among prompts; return the positions of each row, by task.

    What a short prompt does not need goes to longer prompts; each gets at least one position.
    """
    shares = dict[int, int]()
    for index, task in enumerate(sorted(tasks, key=lambda task: task.unread * task.rows)):
        positions = max(1, budget // (len(tasks) - index) // task.rows)
        shares[task.number] = min(positions, task.unread)
        budget = max(0, budget - shares[task.number] * task.rows)
    return shares


@hookimpl
def register_schedulers(registry: Registry[Scheduler]) -> None:
    """Register ``fair``."""
    registry.add("fair", FairScheduler, FairConfig)
