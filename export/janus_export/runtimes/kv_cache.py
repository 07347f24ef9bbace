"""Keys and values that graphs write in place, with room that grows as rows get longer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import GraphContract
from janus_export.runtimes.memory import Buffer, HostBuffer
from janus_modular import PromptError


class Slots:
    """The cache of a session: row r holds ``lengths[r]`` positions, and sees the slots up to its own.

    Attention reads all slots that there are, so on a CPU there are few more than are used: a step costs
    what its context costs, not what a session could hold. When rows outgrow them, they are copied into
    more. On a GPU all are made at once: there a copy would have to go through the host.
    """

    def __init__(
        self,
        backbone: GraphContract,
        allocate: Callable[[tuple[int, ...], str], Buffer],
        *,
        rows: int,
        limit: int,
        room: Callable[[int], int],
    ) -> None:
        """Prepare ``rows`` that may reach ``limit`` positions; no memory is taken yet.

        ``allocate(shape, dtype)`` returns zeroed memory, ``room(end)`` how many slots there are to be
        once rows reach ``end``.
        """
        self.tensors = [one for one in backbone.inputs if one.name in backbone.aliases.values()]
        self.allocate = allocate
        self.limit = limit
        self.room = room
        self.capacity = 0
        self.lengths = np.zeros(rows, np.int64)
        self.buffers: dict[str, Buffer] = {}

    def reach(self, end: int) -> bool:
        """Make room for ``end`` positions; say whether the memory moved.

        Raises:
            PromptError: that is more than the session was opened for.
        """
        self.require(end)
        if end <= self.capacity:
            return False
        self.capacity = self.room(end)
        axes = {"rows": len(self.lengths), "capacity": self.capacity}
        for tensor in self.tensors:
            old = self.buffers.get(tensor.name)
            new = self.allocate(tensor.sized(axes), tensor.dtype)
            if isinstance(old, HostBuffer) and isinstance(new, HostBuffer):
                new.array[:, :, : old.shape[2]] = old.array
            self.buffers[tensor.name] = new
        return True

    def require(self, end: int) -> None:
        """Refuse more positions than there may be; runtimes drop without a word what is written beyond.

        Raises:
            PromptError: that is more than the session was opened for.
        """
        if end > self.limit:
            raise PromptError(
                f"{end} positions do not fit into a session of {self.limit}: shorten the prompt, ask for"
                " fewer tokens, or open the session with more capacity"
            )

    def visible(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return who sees which slot (rows, 1, T, S) from positions ``at`` (rows, T)."""
        return (np.arange(self.capacity) <= at[:, :, None])[:, None]
