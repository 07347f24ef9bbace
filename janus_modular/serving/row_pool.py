"""The rows of an engine's session: who has them, and what they still hold of prompts that were read."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import SharedSession
from janus_modular.sequence import Sequence
from janus_modular.serving.row_view import RowView
from janus_modular.serving.tasks import Mode, Task
from janus_modular.sessions import Integers

FEWEST_REUSED = 4
"""Positions that two prompts must share for a row to be copied; reading so few takes no longer."""


class RowPool:
    """Assigns rows, the first free ones first, so that the backbone runs over few.

    A row keeps its prompt until it is needed again. A new prompt that begins with the same tokens and images
    reads only the rest: a system prompt, or the unconditional row of another drawing.
    """

    def __init__(self, session: SharedSession, rows: int, *, keeps_prompts: bool) -> None:
        """Take a session of ``rows`` rows, all free."""
        self.session, self.keeps_prompts = session, keeps_prompts
        self.owners: list[Task | None] = [None] * rows
        self.prompts: list[NDArray[np.int64] | None] = [None] * rows  # keys of the positions that a row holds
        self.reused_positions = 0

    @property
    def free(self) -> list[int]:
        """The rows that no request has."""
        return [row for row, owner in enumerate(self.owners) if owner is None]

    def in_use(self, mode: Mode | None = None) -> int:
        """Return the number of rows that tasks of a mode have; None: of both."""
        return sum(owner is not None and mode in (None, owner.mode) for owner in self.owners)

    def assign(self, task: Task) -> None:
        """Give a task as many rows as it needs."""
        task.view.rows = self.free[: task.view.count]
        for row in task.view.rows:
            self.owners[row] = task

    def release(self, task: Task) -> None:
        """Take a task's rows back; what they hold of its prompts stays for other prompts."""
        lengths = self.session.lengths.copy()
        for row in task.view.rows:
            self.owners[row] = None
            held = self.prompts[row]
            lengths[row] = 0 if held is None else min(len(held), lengths[row])
        if task.view.rows:
            self.session.truncate(lengths)
        task.view.rows = []

    def begin(self, row: int, prompt: Sequence) -> int:
        """Empty a row for a prompt, but for what it, or another row, holds of it; return how much that is.

        The last position is always left to be read: it gives the hidden state that follows the prompt.
        """
        keys = position_keys(prompt) if self.keeps_prompts else None
        start = 0
        if keys is not None:
            lengths = self.session.lengths
            shared = [
                0 if held is None else _common(held[: lengths[other_row]], keys[:-1])
                for other_row, held in enumerate(self.prompts)
            ]
            source = row if shared[row] == max(shared) else int(np.argmax(shared))
            start = _image_start(prompt, shared[source])
            is_held = source == row or (start >= FEWEST_REUSED and self.session.copy_row(source, row, start))
            start = start if is_held and start >= FEWEST_REUSED else 0
        lengths = self.session.lengths.copy()
        lengths[row] = start
        self.session.truncate(lengths)
        self.prompts[row] = keys
        self.reused_positions += start
        return start

    def cut(self, view: RowView) -> None:
        """Cut the rows of a view back to its lengths."""
        lengths = self.session.lengths.copy()
        lengths[view.rows] = view.lengths
        self.session.truncate(lengths)

    def clear(self) -> None:
        """Empty all rows that no request has."""
        lengths = self.session.lengths.copy()
        lengths[self.free] = 0
        self.session.truncate(lengths)
        for row in self.free:
            self.prompts[row] = None


def position_keys(prompt: Sequence) -> NDArray[np.int64] | None:
    """Return a number for each position (T,): equal numbers, up to a position, mean equal inputs.

    None for a prompt with target images, or with other image positions than its images have, and for a
    prompt that is more than its tokens and images, which is always read as a whole.
    """
    images = prompt.understanding_pixels
    per_position = (prompt.hidden, prompt.together, prompt.position_ids)
    if any(values is not None for values in per_position):
        return None
    positions = np.flatnonzero(prompt.understanding_mask)
    counts = prompt.input_counts
    if prompt.generation_mask.any() or len(positions) != sum(counts):
        return None
    keys = prompt.tokens.copy()
    for image, image_positions in zip(images, np.split(positions, np.cumsum(counts)[:-1]), strict=False):
        digest = int.from_bytes(sha256(f"{image.shape}".encode() + image.tobytes()).digest()[:7], "little")
        keys[image_positions] = -1 - digest
    return keys


def tail(prompt: Sequence, start: int) -> Sequence:
    """Return a prompt without its first positions, which end where an image begins, or outside of images."""
    if not start:
        return prompt
    mask, skipped = prompt.understanding_mask, prompt.inputs_before(start)
    return replace(
        prompt,
        tokens=prompt.tokens[start:],
        labels=prompt.labels[start:],
        understanding_mask=mask[start:],
        generation_mask=prompt.generation_mask[start:],
        understanding_pixels=prompt.understanding_pixels[skipped:],
        understanding_counts=prompt.input_counts[skipped:],
    )


def _common(first: Integers, second: Integers) -> int:
    """Return how many leading numbers are the same."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _image_start(prompt: Sequence, end: int) -> int:
    """Return ``end``, or where the image begins that it would cut in two."""
    mask = prompt.understanding_mask
    partial = int(mask[:end].sum()) - sum(prompt.input_counts[: prompt.inputs_before(end)])
    while partial:
        end -= 1
        partial -= int(mask[end])
    return end
