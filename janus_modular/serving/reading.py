"""Reading prompts in parts, so that a long prompt does not hold up the other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus_modular.protocols import SharedSession
from janus_modular.sequence import Sequence
from janus_modular.serving.row_pool import RowPool, tail
from janus_modular.serving.row_view import ReadCall, SharedTensor, Vectors, sources_and_rows
from janus_modular.serving.tasks import Task

LEAST_FILLED = 0.5
"""Rows are read together if each has at least this share of the longest one's positions."""


@dataclass
class RowReading:
    """A prompt that is being read into a row."""

    task: Task
    row: int
    prompt: Sequence  # without what the row holds already
    x: Vectors | None = None  # (T, D)
    done: int = 0  # positions
    state: Vectors | None = None  # (1, D), the last hidden state, once all positions are read

    @property
    def unread(self) -> int:
        """The positions that remain."""
        return len(self.prompt) - self.done


class Reader:
    """Prompts that are being read, of several tasks."""

    def __init__(
        self, session: SharedSession, pool: RowPool, on_error: Callable[[Task, Exception], None]
    ) -> None:
        """Read into the rows of a pool; ``on_error`` gets each task whose prompts cannot be read."""
        self.session, self.pool, self.on_error = session, pool, on_error
        self.readings: dict[Task, list[RowReading]] = {}
        self.positions = 0  # that were read

    def begin(self, tasks: Many[Task]) -> None:
        """Prepare the rows of tasks that wait for prompts to be read, and embed the prompts."""
        begun = list[RowReading]()
        for task in tasks:
            assert isinstance(task.call, ReadCall)
            rows = task.view.rows[task.call.first_row :]
            self.readings[task] = [
                RowReading(task, row, tail(prompt, self.pool.begin(row, prompt)))
                for row, prompt in zip(rows, task.call.prompts, strict=False)
            ]
            begun += self.readings[task]
        self._isolated(begun, self._embed)

    def unread(self, task: Task) -> int:
        """Return the positions that remain, of the longest prompt of a task."""
        return max((reading.unread for reading in self.readings.get(task, ())), default=0)

    def forget(self, task: Task) -> None:
        """Stop reading a task's prompts."""
        self.readings.pop(task, None)

    def read(self, positions: Mapping[Task, int]) -> list[tuple[Task, Vectors]]:
        """Read up to so many more positions of each row of some tasks.

        Return the tasks all of whose prompts are read now, with the last hidden states (n, D).
        """
        parts = [reading for task in positions for reading in self.readings.get(task, ()) if reading.unread]
        limit = self.session.max_feed
        counts = {
            reading.row: min(reading.unread, positions[reading.task], limit or reading.unread)
            for reading in parts
        }
        for group in together(parts, counts):
            self._isolated(group, lambda readings: self._read(readings, counts))
        finished = [task for task in positions if task in self.readings and not self.unread(task)]
        return [(task, self._states(self.readings.pop(task))) for task in finished]

    def _isolated(self, readings: Many[RowReading], act: Callable[[Many[RowReading]], None]) -> None:
        """Act on readings together; if that raises, on those of each task, to find out whose error it is."""
        tasks = list(dict.fromkeys(reading.task for reading in readings))
        try:
            if tasks:
                act(readings)
        except Exception as error:
            for task in tasks:
                if len(tasks) > 1:
                    self._isolated([reading for reading in readings if reading.task is task], act)
                else:
                    self.forget(task)
                    self.on_error(task, error)

    def _embed(self, readings: Many[RowReading]) -> None:
        x = self.session.embed_prompts([reading.prompt for reading in readings])
        if x is None:  # the runtime reads prompts as a whole
            return
        source, num_positions = SharedTensor(x), x.shape[1]
        for index, reading in enumerate(readings):
            rows = index * num_positions + np.arange(len(reading.prompt))
            reading.x = Vectors(source, rows, self.session.hidden_size)

    def _read(self, readings: Many[RowReading], counts: Mapping[int, int]) -> None:
        """Read positions of consecutive rows at once."""
        if any(reading.x is None for reading in readings):
            self._admit(readings)
            return
        numbers = np.array([counts[reading.row] for reading in readings])
        num_positions = int(numbers.max())
        sources, vectors = sources_and_rows([reading.x for reading in readings])
        starts = np.cumsum([0, *(len(reading.prompt) for reading in readings[:-1])])
        starts += [reading.done for reading in readings]
        offsets = np.minimum(np.arange(num_positions), numbers[:, None] - 1)  # padding: the last position
        index = starts[:, None] + offsets
        x = self._take(sources, vectors[index])
        hidden = self.session.extend_rows(x, numbers, readings[0].row)
        for reading, count in zip(readings, numbers.tolist(), strict=True):
            reading.done += count
        self.positions += int(numbers.sum())
        ended = [index for index, reading in enumerate(readings) if not reading.unread]
        if ended:
            last = [index * num_positions + int(numbers[index]) - 1 for index in ended]
            self._set_states([readings[index] for index in ended], hidden, last)

    def _take(self, sources: list[Any], index: Any) -> Any:
        """Return vectors (n, W, D), without a copy where they are a whole tensor."""
        whole = len(sources) == 1 and tuple(sources[0].shape[:2]) == index.shape
        if whole and (index.reshape(-1) == np.arange(index.size)).all():
            return sources[0]
        return self.session.take(sources, index)

    def _admit(self, readings: Many[RowReading]) -> None:
        """Read prompts as a whole: the runtime reads no parts."""
        rows = [reading.row for reading in readings]
        self.session.free(rows)
        whole = [_prompt(reading) for reading in readings]
        hidden = self.session.admit(whole, rows)
        self.positions += sum(map(len, whole))
        for reading in readings:
            reading.done = len(reading.prompt)
        self._set_states(readings, hidden, list(range(len(rows))))

    def _set_states(self, readings: Many[RowReading], hidden: Any, last: list[int]) -> None:
        source = SharedTensor(self.session.take(hidden, np.array(last)))
        for index, reading in enumerate(readings):
            reading.state = Vectors(source, np.array([index]), self.session.hidden_size)

    def _states(self, readings: Many[RowReading]) -> Vectors:
        sources, vectors = sources_and_rows([reading.state for reading in readings])
        tensor = sources[0] if len(sources) == 1 else self.session.take(sources, vectors)
        rows = vectors if len(sources) == 1 else np.arange(len(vectors))
        return Vectors(SharedTensor(tensor), rows, self.session.hidden_size)


def together(readings: Many[RowReading], counts: Mapping[int, int]) -> list[list[RowReading]]:
    """Divide readings into runs of consecutive rows that read about as many positions, or whole prompts."""
    groups = list[list[RowReading]]()
    for reading in sorted(readings, key=lambda reading: reading.row):
        group = groups[-1] if groups else []
        numbers = [counts[member.row] for member in (*group, reading)]
        follows = bool(group) and group[-1].row + 1 == reading.row
        same_form = follows and (group[-1].x is None) == (reading.x is None)
        if same_form and min(numbers) >= LEAST_FILLED * max(numbers):
            group.append(reading)
        else:
            groups.append([reading])
    return groups


def _prompt(reading: RowReading) -> Sequence:
    """Return a row's whole prompt."""
    call, view = reading.task.call, reading.task.view
    assert isinstance(call, ReadCall)
    return call.prompts[view.rows.index(reading.row) - call.first_row]
