"""Tensors in a GPU's memory, and the ways into it and along it that do not make the host wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import Tensor
from janus_export.runtimes.memory import STORED, to_numbers, to_stored
from janus_export.runtimes.trt.cuda import Gpu, Memory

ALIGNMENT = 256  # bytes; what CUDA's own allocations have


class DeviceTensor:
    """A `janus_export.runtimes.memory.Buffer` of a GPU. To read it is to wait; nothing else waits."""

    memory = "cuda"

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: str, memory: Memory, offset: int = 0) -> None:
        """Look at memory from ``offset`` bytes on as a tensor; the memory lives as long as this does."""
        self.gpu, self.shape, self.dtype, self.owner = gpu, shape, dtype, memory
        self.index = gpu.index
        self.address = memory.address + offset
        self.itemsize = np.dtype(STORED[dtype]).itemsize

    @classmethod
    def zeros(cls, gpu: Gpu, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """Allocate one."""
        return cls(gpu, shape, dtype, gpu.allocate(prod(shape) * np.dtype(STORED[dtype]).itemsize))

    def part(self, start: int, count: int) -> DeviceTensor:
        """Look at ``count`` of its rows."""
        offset = self.address - self.owner.address + start * (self.nbytes // self.shape[0])
        return DeviceTensor(self.gpu, (count, *self.shape[1:]), self.dtype, self.owner, offset)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.itemsize

    def write(self, value: Any) -> None:
        """Overwrite it from numpy."""
        stored = np.broadcast_to(to_stored(value, self.dtype), self.shape)
        self.gpu.copy_in(self.address, np.ascontiguousarray(stored))

    def read(self) -> NDArray[Any]:
        """Bring it to numpy; bfloat16 as float32."""
        stored = np.empty(self.shape, STORED[self.dtype])
        self.gpu.copy_out(stored, self.address)
        self.gpu.synchronize()
        return to_numbers(stored, self.dtype)


class Feed:
    """Small inputs of a step, on their way to a GPU: one copy for all of them, out of pinned memory.

    The host may run ``ahead`` steps ahead: each step's inputs lie in a lane of their own until the GPU has
    fetched them. When all lanes are taken, `send` waits once, and all are free.

    Noise goes this way too, 64 KB for each step of an image with 16,384 codes. That of a whole drawing
    would be 38 MB an image, and the GPU would stand still until all of it was drawn.
    """

    def __init__(self, gpu: Gpu, tensors: Sequence[Tensor], axes: Mapping[str, int], *, ahead: int) -> None:
        """Lay tensors out one after another, each at its length; lanes are made when they are needed."""
        self.gpu, self.ahead = gpu, ahead
        self.layout: dict[str, tuple[int, tuple[int, ...], str]] = {}  # offset, shape, dtype
        self.size = 0
        for one in tensors:
            shape = one.sized(axes)
            self.layout[one.name] = self.size, shape, one.dtype
            size = prod(shape) * np.dtype(STORED[one.dtype]).itemsize
            self.size += -(-size // ALIGNMENT) * ALIGNMENT
        memory = gpu.allocate(self.size)
        self.tensors = {
            name: DeviceTensor(gpu, shape, dtype, memory, offset)
            for name, (offset, shape, dtype) in self.layout.items()
        }
        self.lanes: list[Lane] = []
        self.taken, self.epoch = 0, gpu.epoch

    def send(self, values: Mapping[str, Any]) -> None:
        """Put a value for each tensor on its way."""
        if not self.tensors:
            return
        lane = self._lane()
        for name, array in lane.arrays.items():
            array[...] = to_stored(values[name], self.tensors[name].dtype)
        self.gpu.copy_in(next(iter(self.tensors.values())).address, lane.bytes)

    def _lane(self) -> Lane:
        if self.epoch == self.gpu.epoch and self.taken == self.ahead:
            self.gpu.synchronize()
        if self.epoch != self.gpu.epoch:  # whoever waited: what was sent has arrived
            self.epoch, self.taken = self.gpu.epoch, 0
        if self.taken == len(self.lanes):  # who waits after every step needs one alone
            self._add_lanes(1 if not self.lanes else self.ahead - 1)
        self.taken += 1
        return self.lanes[self.taken - 1]

    def _add_lanes(self, count: int) -> None:
        pinned = self.gpu.pin(count * self.size)
        for start in range(0, count * self.size, self.size):
            lane = pinned.bytes[start : start + self.size]
            arrays = {
                name: lane[offset : offset + prod(shape) * np.dtype(STORED[dtype]).itemsize]
                .view(STORED[dtype])
                .reshape(shape)
                for name, (offset, shape, dtype) in self.layout.items()
            }
            self.lanes.append(Lane(lane, arrays, pinned))


@dataclass(frozen=True)
class Lane:
    """Pinned memory for the inputs of one step."""

    bytes: NDArray[np.uint8]
    arrays: dict[str, NDArray[Any]]  # by name, views of it
    owner: Memory


class Choices:
    """What steps choose, kept on the GPU: ids (rows, steps, ...), a column a step."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], steps: int) -> None:
        """Keep what is chosen at a step: ids (rows,), or (rows, S) of several codes a position."""
        self.gpu, self.shape, self.steps = gpu, shape, steps
        self.used = steps

    def next(self) -> Column:
        """Return the place of the next step's choices; memory is taken for ``steps`` at once."""
        if self.used == self.steps:
            rows, *of_step = self.shape
            self.log, self.used = DeviceTensor.zeros(self.gpu, (rows, self.steps, *of_step), "int64"), 0
        self.used += 1
        return Column(self.log, self.used - 1)


class Column(DeviceTensor):
    """What one step chose (rows, ...). Its rows lie a log's width apart, so that no graph is bound to it."""

    def __init__(self, log: DeviceTensor, at: int) -> None:
        self.size = prod(log.shape[2:]) * log.itemsize  # bytes of one row's
        offset = log.address - log.owner.address + at * self.size
        super().__init__(log.gpu, (log.shape[0], *log.shape[2:]), log.dtype, log.owner, offset)
        self.log, self.at = log, at
        self.stride = log.shape[1] * self.size  # bytes from a row to the next

    def take(self, ids: DeviceTensor) -> None:
        """Copy what was just chosen (rows, ...) here."""
        size, rows = self.size, ids.shape[0]
        self.gpu.copy_across(
            self.address, ids.address, width=size, rows=rows, stride=size, to_stride=self.stride
        )

    def write(self, value: Any) -> None:
        """Nobody changes what was chosen."""
        raise TypeError("a choice is written by graphs alone")

    def read(self) -> NDArray[Any]:
        """Bring it to numpy."""
        ids = np.empty(self.shape, STORED[self.dtype])
        self.gpu.copy_out(ids, self.address, stride=self.stride)
        self.gpu.synchronize()
        return ids


def join(columns: Sequence[Column]) -> DeviceTensor:
    """Return what successive steps chose as (rows, steps, ...), contiguous.

    Raises:
        ValueError: the columns are not those of successive steps.
    """
    first = columns[0]
    if any(one.log is not first.log or one.at != first.at + i for i, one in enumerate(columns)):
        raise ValueError("only what successive steps of one session chose can be joined")
    rows, *of_step = first.shape
    joined = DeviceTensor.zeros(first.gpu, (rows, len(columns), *of_step), first.dtype)
    width = len(columns) * first.size
    joined.gpu.copy_across(joined.address, first.address, width=width, rows=rows, stride=first.stride)
    return joined
