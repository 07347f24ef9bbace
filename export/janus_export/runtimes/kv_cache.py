"""The cache of a session: keys and values in memory that grows as rows get longer, and recurrent states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import GraphContract
from janus_export.runtimes.memory import Buffer, HostBuffer

HOST_INPUTS = ("positions", "mask", "write_index", "counts")
"""Inputs of the backbone that the host computes for each run; a graph has those that its cache needs."""


class KVCache:
    """The keys and values of a session's rows, and states of recurrent layers. A row sees its own positions.

    Attention reads all allocated positions, so on a CPU only a few more than the used ones are allocated: the
    cost of a step depends on its context, not on max_seq_len. When rows need more positions, the cache is
    copied into a larger one. On a GPU all positions are allocated at once, because a copy would go through
    the host.

    A state has no axis of positions. A graph writes the new state to other memory; `Session.feed` copies it.
    """

    def __init__(
        self,
        backbone: GraphContract,
        allocate: Callable[[tuple[int, ...], str], Buffer],
        *,
        rows: int,
        capacity_for: Callable[[int], int],
    ) -> None:
        """Prepare ``rows`` rows; no memory is allocated yet.

        ``allocate(shape, dtype)`` returns zeroed memory, ``capacity_for(end)`` the positions per row once a
        row reaches ``end``.
        """
        self.contract = backbone
        self.tensors = [tensor for tensor in backbone.inputs if tensor.name in backbone.aliases.values()]
        self.states = {past: present for present, past in backbone.states.items()}
        self.state_tensors = [tensor for tensor in backbone.inputs if tensor.name in self.states]
        self.inputs = [tensor for tensor in backbone.inputs if tensor.name in HOST_INPUTS]
        self.allocate = allocate
        self.capacity_for = capacity_for
        self.rows, self.capacity = rows, 0
        self.buffers: dict[str, Buffer] = {}  # by input of the graph: (rows, heads, capacity, head dim)
        self.old_states, self.new_states = (self.state_buffers(rows) if rows else {} for _ in range(2))

    def reach(self, end: int) -> bool:
        """Make sure that each row has ``end`` positions; return True if the memory moved."""
        if end <= self.capacity:
            return False
        before, self.capacity = self.capacity, self.capacity_for(end)
        for tensor in self.tensors:
            old = self.buffers.get(tensor.name)
            new = self.allocate(tensor.sized({"rows": self.rows, "capacity": self.capacity}), tensor.dtype)
            axis = tensor.shape.index("capacity")
            if isinstance(old, HostBuffer) and isinstance(new, HostBuffer):
                new.array[(*[slice(None)] * axis, slice(before))] = old.array
            elif old is not None:
                padding = [(0, self.capacity - before if i == axis else 0) for i in range(len(tensor.shape))]
                new.write(np.pad(old.read(), padding))
            self.buffers[tensor.name] = new
        return True

    def host_inputs(
        self,
        index: NDArray[np.int64],
        positions: NDArray[np.int64],
        counts: NDArray[np.int64],
        together: NDArray[np.int64] | None = None,
        hidden: NDArray[np.bool_] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the inputs that the host computes for new positions: see `host_inputs`."""
        capacity = self.capacity
        return host_inputs(
            self.contract, index, positions, counts, capacity=capacity, together=together, hidden=hidden
        )

    def state_buffers(self, rows: int) -> dict[str, Buffer]:
        """Return new states of ``rows`` rows without positions, by input of the graph."""
        return {
            tensor.name: self.allocate(tensor.sized({"rows": rows}), tensor.dtype)
            for tensor in self.state_tensors
        }

    def outputs(self, new_states: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Return the outputs of the graph that are new states, by name."""
        return {present: new_states[past] for past, present in self.states.items()}


def host_inputs(
    backbone: GraphContract,
    index: NDArray[np.int64],
    positions: NDArray[np.int64],
    counts: NDArray[np.int64],
    *,
    capacity: int,
    together: NDArray[np.int64] | None = None,
    hidden: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the backbone's inputs that the host computes for new positions, by name.

    Args:
        backbone: the graph's contract; it has those inputs that its cache needs.
        index: of the positions in their rows (rows, T). A position attends to those up to its own.
        positions: as `janus_modular.positions.RowPositions` returns them for the index.
        counts: how many of them each row keeps (rows,).
        capacity: positions per row of the cache.
        together: the blocks (rows, T') of rows from their first position on. A new position sees all of its
            block, which has to be in this run; None: it is causal.
        hidden: the positions (rows, T') of rows, from their first on, that no position sees; None: all are
            seen.
    """

    def mask() -> NDArray[np.bool_]:
        seen = np.arange(capacity) <= index[:, :, None]  # (rows, T, capacity)
        if together is not None:
            blocks = np.zeros((len(index), max(capacity, int(index.max()) + 1)), np.int64)
            blocks[:, : together.shape[1]] = together
            own = np.take_along_axis(blocks, index, axis=1)[:, :, None]  # (rows, T, 1)
            seen |= (own > 0) & (own == blocks[:, None, :capacity])
        if hidden is not None:
            seen[:, :, : hidden.shape[1]] &= ~hidden[:, None, :capacity]
        return seen[:, None]

    values: dict[str, Callable[[], NDArray[Any]]] = {
        "positions": lambda: positions,
        "mask": mask,
        "write_index": lambda: index[:, 0].copy(),
        "counts": lambda: counts,
    }
    return {tensor.name: values[tensor.name]() for tensor in backbone.inputs if tensor.name in values}


def axes_of_positions(inputs: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of axes on which positions have ids, from a backbone's inputs in a manifest."""
    shape = next(tensor["shape"] for tensor in inputs if tensor["name"] == "positions")
    return shape[0] - 1 if len(shape) == 3 else 0
