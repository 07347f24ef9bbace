"""Checking drafts: a pass of the backbone chooses all ids of a window, and confirms the leading right ones.

With the noise held fixed, the next id is a function of the ids before it. A pass reads a row's last known id
and drafts of the next ones, and chooses an id behind each. The first choice is right, since all before it is
known; so is each that follows a draft which equals the choice for its position. No torch in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from janus_modular import PromptError, Session, SharedSession
from janus_plugins.samplers.noise import exponential_noise

Integers = NDArray[np.int64]


def check_session(session: Session, sampler: str, sequential: str, window: int) -> None:
    """Check that a session can drop positions again, and takes a window of them at once.

    Raises:
        PromptError: it cannot; ``sequential`` names the sampler that needs neither.
    """
    if session.has_states:
        raise PromptError(
            f"the sampler '{sampler}' drops positions whose drafts were wrong; found a backbone with"
            f" recurrent layers, whose states cannot be cut back: choose the sampler '{sequential}'."
        )
    limit = session.max_feed if isinstance(session, SharedSession) else None
    if limit is not None and window > limit:
        raise PromptError(
            f"window: found {window}; expected {limit} at most, the positions of a row that this runtime was"
            f" built to take at once. Choose a smaller window, or the sampler '{sequential}'."
        )


def confirmed(drafts: Integers, chosen: Integers, counts: Integers) -> Integers:
    """Return how many chosen ids of each row (rows,) are final: the leading right drafts, and one more.

    Args:
        drafts: what the pass read behind the last known id, (rows, W - 1) or (rows, W - 1, S).
        chosen: the ids that it chose, (rows, W) or (rows, W, S).
        counts: how many positions each row had in the pass (rows,), 0 to W.
    """
    same = (drafts == chosen[:, :-1]).all(axis=tuple(range(2, drafts.ndim)))  # (rows, W - 1)
    same &= np.arange(1, chosen.shape[1]) < counts[:, None]
    return np.where(counts > 0, 1 + np.cumprod(same, axis=1, dtype=np.int64).sum(1), 0)


def read_vectors(counts: Integers, num_positions: int) -> Integers:
    """Return the hidden states of a pass (rows, W, D) that are sampled from, as `take` counts them (rows, W).

    States of positions that a row does not have are undefined; the first defined one takes their place.
    """
    vectors = np.arange(len(counts) * num_positions).reshape(len(counts), num_positions)
    return np.where(
        np.arange(num_positions) < counts[:, None], vectors, int(np.argmax(counts > 0)) * num_positions
    )


class NoiseWindow:
    """The noise of each row's coming positions: that of drawing them one by one, from the same generators."""

    def __init__(self, rngs: Sequence[np.random.Generator], size: int, *, greedy: bool) -> None:
        """Begin at position 0 with noise of ``size`` numbers a position; ``greedy``: ones."""
        self.rngs, self.size, self.greedy = rngs, size, greedy
        self.rows = [deque[NDArray[np.float32]]() for _ in rngs]  # of positions from ``first`` on
        self.first = np.zeros(len(rngs), np.int64)

    def read(self, starts: Integers, counts: Integers, num_positions: int) -> NDArray[np.float32]:
        """Return the noise (rows, W, size) of W positions from ``starts`` (rows,) on, which never decrease.

        Behind a row's ``counts`` positions it is ones.
        """
        noise = np.ones((len(self.rows), num_positions, self.size), np.float32)
        for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            if not self.greedy and count:
                noise[row, :count] = self._of_row(row, start, count)
        return noise

    def _of_row(self, row: int, start: int, count: int) -> list[NDArray[np.float32]]:
        kept = self.rows[row]
        while self.first[row] < start:  # it has no more use
            if kept:
                kept.popleft()
            else:
                exponential_noise([self.rngs[row]], self.size)
            self.first[row] += 1
        while len(kept) < count:
            kept.append(exponential_noise([self.rngs[row]], self.size)[0])
        return [kept[index] for index in range(count)]
