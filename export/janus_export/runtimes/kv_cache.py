"""Keys and values that graphs write in place, in memory that grows as rows get longer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import GraphContract
from janus_export.runtimes.memory import Buffer, HostBuffer


class KVCache:
    """The keys and values of a session's rows. Row r sees the slots up to its own position.

    Attention reads all allocated slots, so on a CPU only a few more than the used ones are allocated: the
    cost of a step depends on its context, not on the session's capacity. When rows need more slots, the
    cache is copied into a larger one. On a GPU all slots are allocated at once, because a copy would go
    through the host.
    """

    def __init__(
        self,
        backbone: GraphContract,
        allocate: Callable[[tuple[int, ...], str], Buffer],
        *,
        rows: int,
        slots_for: Callable[[int], int],
    ) -> None:
        """Prepare ``rows`` rows; no memory is allocated yet.

        ``allocate(shape, dtype)`` returns zeroed memory, ``slots_for(end)`` the number of slots per row once
        a row reaches ``end``.
        """
        self.tensors = [tensor for tensor in backbone.inputs if tensor.name in backbone.aliases.values()]
        self.allocate = allocate
        self.slots_for = slots_for
        self.rows, self.slots = rows, 0
        self.buffers: dict[str, Buffer] = {}  # by input of the graph: (rows, heads, slots, head dim)

    def reach(self, end: int) -> bool:
        """Make sure that each row has ``end`` slots; return True if the memory moved."""
        if end <= self.slots:
            return False
        before, self.slots = self.slots, self.slots_for(end)
        for tensor in self.tensors:
            old = self.buffers.get(tensor.name)
            new = self.allocate(tensor.sized({"rows": self.rows, "capacity": self.slots}), tensor.dtype)
            if isinstance(old, HostBuffer) and isinstance(new, HostBuffer):
                new.array[:, :, :before] = old.array
            elif old is not None:
                padding = [(0, 0), (0, 0), (0, self.slots - before), (0, 0)]
                new.write(np.pad(old.read(), padding))
            self.buffers[tensor.name] = new
        return True

    def visible(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which slots each position sees (rows, 1, T, slots), from positions (rows, T)."""
        return (np.arange(self.slots) <= positions[:, :, None])[:, None]
