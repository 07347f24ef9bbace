"""Position ids on several axes, for multimodal rotary embeddings (M-RoPE), in numpy.

The rule is that of "Qwen2-VL: enhancing vision-language model's perception of the world at any resolution",
section 2.1: a text token has the same id on all axes. All positions of an input image have one temporal id;
their height and width ids are rows and columns, counted from this id. The next position has the largest id of
the image plus 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import PromptError
from janus_modular.sequence import Sequence

Integers = NDArray[np.int64]

POSITION_AXES = ("temporal", "height", "width")
"""The axes of position ids."""


@dataclass(frozen=True)
class PositionRule:
    """The rule that assigns position ids to the texts and images of a sequence (M-RoPE, as in Qwen2-VL)."""

    axes: list[str] = field(default_factory=list)  # of POSITION_AXES, as the backbone has them
    grid: tuple[int, int] = (1, 1)  # rows and columns of the positions of an input image, or of the largest

    def ids(self, sequence: Sequence, grids: Many[tuple[int, int]] | None = None) -> Integers:
        """Return the position ids (P, T) of a sequence on P axes.

        Target images have ids like text, because a session samples them position by position.

        Args:
            sequence: with image inputs.
            grids: rows and columns of the positions of each image; None: all have ``grid``.
        """
        is_image = sequence.understanding_mask
        if grids is None:
            grids = [self.grid] * (int(is_image.sum()) // (self.grid[0] * self.grid[1]))
        coordinates = [np.divmod(np.arange(rows * columns), columns) for rows, columns in grids]
        inside = {
            "height": np.concatenate([row for row, _ in coordinates] or [np.zeros(0, np.int64)]),
            "width": np.concatenate([column for _, column in coordinates] or [np.zeros(0, np.int64)]),
        }
        advance = (~is_image).astype(np.int64)  # of the id at the next position
        ends = np.flatnonzero(is_image)[np.cumsum([rows * columns for rows, columns in grids], dtype=int) - 1]
        advance[ends] = [max(grid) for grid in grids]
        start = np.cumsum(advance) - advance  # (T,)
        ids = np.tile(start, (len(self.axes), 1))
        for axis, values in zip(self.axes, ids, strict=True):
            if axis in inside:
                values[is_image] += inside[axis]
        return ids


def extended(ids: Integers, count: int) -> Integers:
    """Return ids (P, T + count): ``count`` more positions, whose ids are equal on all axes."""
    following = next_id(ids) + np.arange(count)
    return np.concatenate([ids, np.broadcast_to(following, (len(ids), count))], axis=1)


def next_id(ids: Integers) -> int:
    """Return the id of the position after ids (P, T), which is equal on all axes."""
    return int(ids.max()) + 1 if ids.size else 0


class RowPositions:
    """The positions of a session's rows: their index, and ids on ``axes`` axes."""

    def __init__(self, axes: int, rows: int) -> None:
        """Prepare empty rows."""
        self.axes = axes
        self.ids = [np.zeros((axes, 0), np.int64)] * rows  # (P, T) of what each row read as a prompt
        self.together = [np.zeros(0, np.int64)] * rows  # (T,) its blocks
        self.hidden = [np.zeros(0, np.bool_)] * rows  # (T,) which of its positions no other attends to

    @classmethod
    def of_prompts(cls, axes: int, prompts: Many[Sequence]) -> RowPositions:
        """Return the positions of rows that hold these prompts."""
        positions = cls(axes, len(prompts))
        for row, prompt in enumerate(prompts):
            positions.admit(row, prompt)
        return positions

    def admit(self, row: int, prompt: Sequence) -> None:
        """Set what a row holds to a prompt."""
        if self.axes:
            counter = np.broadcast_to(np.arange(len(prompt)), (self.axes, len(prompt)))
            self.ids[row] = counter if prompt.position_ids is None else prompt.position_ids
        self.together[row] = np.zeros(0, np.int64) if prompt.together is None else prompt.together
        self.hidden[row] = np.zeros(0, np.bool_) if prompt.hidden is None else prompt.hidden

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Set what a row holds to the first ``length`` positions of another row."""
        self.ids[target] = self.ids[source][:, :length]
        self.together[target] = self.together[source][:length]
        self.hidden[target] = self.hidden[source][:length]

    def truncate(self, lengths: Integers) -> None:
        """Cut rows back to these lengths (rows,).

        Raises:
            PromptError: a block would be divided, whose positions have seen all of it.
        """
        for row, (blocks, length) in enumerate(zip(self.together, lengths.tolist(), strict=True)):
            if 0 < length < len(blocks) and blocks[length] and blocks[length] == blocks[length - 1]:
                first, end = np.flatnonzero(blocks == blocks[length])[[0, -1]] + (0, 1)
                raise PromptError(
                    f"truncate: found length {length} for row {row}; expected {first} or less, or {end} or"
                    " more: the positions between attend to each other, and can only be removed together."
                )
        self.together = [blocks[:length] for blocks, length in zip(self.together, lengths, strict=True)]
        self.hidden = [mask[:length] for mask, length in zip(self.hidden, lengths, strict=True)]
        self.ids = [ids[:, :length] for ids, length in zip(self.ids, lengths, strict=True)]

    def of(self, index: Integers, last: int | None = None) -> Integers:
        """Return the positions at ``index`` (rows, W) of the rows: (rows, W), or (1 + P, rows, W) with ids.

        ``last``: the last position that there is, beyond which there is padding of full rows alone.
        """
        counter = index if last is None else np.minimum(index, last)
        if not self.axes:
            return counter
        positions = np.empty((1 + self.axes, *index.shape), np.int64)
        positions[0] = counter
        for row, ids in enumerate(self.ids):
            longer = extended(ids, max(0, int(counter[row].max()) + 1 - ids.shape[1]))
            positions[1:, row] = longer[:, counter[row]]
        return positions

    @property
    def blocks(self) -> Integers | None:
        """The block numbers (rows, T) of the positions, 0 behind shorter rows; None: all rows are causal."""
        return padded(self.together)

    def hidden_in(self, first_row: int = 0, count: int | None = None) -> NDArray[np.bool_] | None:
        """Return a mask (n, T) of the hidden positions of ``count`` rows; None: no position is hidden."""
        end = None if count is None else first_row + count
        return padded(self.hidden[first_row:end])


def padded(rows: Many[NDArray[Any]]) -> NDArray[Any] | None:
    """Return arrays (T,) as one (rows, T), with zeros behind shorter ones; None where all are 0."""
    if not any(row.any() for row in rows):
        return None
    joined = np.zeros((len(rows), max(map(len, rows))), rows[0].dtype)
    for row, values in zip(joined, rows, strict=True):
        row[: len(values)] = values
    return joined


def check_together(prompts: Many[Sequence], together: bool) -> None:
    """Check that prompts have blocks of positions that attend to each other exactly if the model has.

    Raises:
        PromptError: prompts have blocks, and the model is causal; or prompts have images and no blocks.
    """
    for prompt in prompts:
        if prompt.together is None and together and prompt.understanding_mask.any():
            raise PromptError(
                "prompts: found an image and no `together`; expected the positions that attend to each other."
                " Build prompts with the model's own processor."
            )
        if prompt.together is not None and not together:
            raise PromptError(
                "prompts: found positions that attend to each other; expected none: the model is causal."
                " Build prompts with the model's own processor."
            )


def check_position_ids(prompts: Many[Sequence], axes: int) -> None:
    """Check that prompts have the position ids that a backbone with ``axes`` axes of ids needs.

    Raises:
        PromptError: they have ids of another number of axes, or images and no ids.
    """
    for prompt in prompts:
        actual = 0 if prompt.position_ids is None else len(prompt.position_ids)
        if actual != axes and (actual or prompt.understanding_mask.any()):
            raise PromptError(
                f"prompts: found position ids on {actual} axes; expected {axes}, which the backbone has."
                " Build prompts with the model's own processor."
            )
