"""Reading prompts in parts, so that a long prompt does not hold up the other rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from janus_modular.protocols import SharedSession
from janus_modular.serving.row_pool import RowPool, consecutive, tail
from janus_modular.serving.row_view import ReadCall, SharedTensor, Vectors
from janus_modular.serving.tasks import Task


class Reading:
    """Prompts that are being read into a task's rows."""

    def __init__(self, task: Task, pool: RowPool) -> None:
        """Prepare the rows; nothing is computed yet."""
        assert isinstance(task.call, ReadCall)
        self.task, self.call = task, task.call
        first = task.call.first_row
        self.rows = task.view.rows[first : first + len(task.call.prompts)]
        starts = [pool.begin(row, prompt) for row, prompt in zip(self.rows, task.call.prompts, strict=True)]
        self.prompts = [tail(prompt, start) for prompt, start in zip(task.call.prompts, starts, strict=True)]
        self.lengths = np.array([len(prompt) for prompt in self.prompts])
        self.done = 0  # positions of each row, of those that are to be read
        self.x: Any = None  # (n, T, D)
        self.states: list[tuple[list[int], Any]] = []  # of rows, by number: their last states (k, D)

    @property
    def unread(self) -> int:
        """The positions that remain, of the longest prompt."""
        return int(self.lengths.max()) - self.done

    def read(self, session: SharedSession, positions: int) -> int:
        """Read up to ``positions`` more of each row; return how many of all rows were read."""
        if self.x is None:
            self.x = session.embed_prompts(self.prompts)
        if self.x is None:
            return self._admit(session)
        start, width = self.done, min(positions, self.unread, session.max_feed or positions)
        total = self.x.shape[1]
        for run in consecutive(self.rows):
            counts = np.clip(self.lengths[run] - start, 0, width)
            index = np.minimum(start + np.arange(width), total - 1)
            whole = run == list(range(len(self.rows))) and (start, width) == (0, total)
            x = self.x if whole else session.take(self.x, np.array(run)[:, None] * total + index)
            hidden = session.extend_rows(x, counts, self.rows[run[0]])
            ended = [k for k, row in enumerate(run) if start < self.lengths[row] <= start + width]
            if ended:
                last = [k * width + int(self.lengths[run[k]]) - 1 - start for k in ended]
                self.states.append(([run[k] for k in ended], session.take(hidden, np.array(last))))
        self.done += width
        return int(np.clip(self.lengths - start, 0, width).sum())

    def result(self, session: SharedSession) -> Vectors:
        """Return the last hidden states (n, D), once nothing is unread."""
        order = [row for rows, _ in self.states for row in rows]
        tensors = [states for _, states in self.states]
        joined = tensors[0] if len(tensors) == 1 else session.take(tensors, np.arange(len(order)))
        return Vectors(SharedTensor(joined), np.argsort(order), session.hidden_size)

    def _admit(self, session: SharedSession) -> int:
        """Read the prompts as a whole, where the runtime reads no parts."""
        session.free(self.rows)
        hidden = session.admit(self.call.prompts, self.rows)
        rows = list(range(len(self.rows)))
        self.states.append((rows, session.take(hidden, np.array(rows))))
        self.done = int(self.lengths.max())
        return sum(map(len, self.call.prompts))
