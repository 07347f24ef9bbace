"""Tensors in a GPU's memory, and copies to it and within it that do not make the host wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.runtimes.memory import STORED, to_numbers, to_stored
from janus_export.runtimes.trt.cuda import Gpu, Memory
from janus_modular.graph_specs import TensorSpec

ALIGNMENT = 256  # alignment of CUDA's allocations, in bytes


class DeviceTensor:
    """A `janus_export.runtimes.memory.Buffer` of a GPU. Only `read` waits for the GPU."""

    memory = "cuda"

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: str, memory: Memory, offset: int = 0) -> None:
        """Make a tensor of memory from ``offset`` bytes on, which lives as long as the tensor does."""
        self.gpu, self.shape, self.dtype, self.owner = gpu, shape, dtype, memory
        self.index = gpu.index
        self.address = memory.address + offset
        self.itemsize = np.dtype(STORED[dtype]).itemsize

    @classmethod
    def zeros(cls, gpu: Gpu, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """Allocate a tensor of zeros."""
        return cls(gpu, shape, dtype, gpu.allocate(prod(shape) * np.dtype(STORED[dtype]).itemsize))

    def rows(self, first: int, count: int) -> DeviceTensor:
        """Return ``count`` of its rows, along the first axis, in the same memory."""
        return self.view((count, *self.shape[1:]), first * (self.nbytes // self.shape[0]))

    def view(self, shape: tuple[int, ...], offset: int = 0) -> DeviceTensor:
        """Return its memory from ``offset`` bytes on as a tensor of this shape."""
        start = self.address - self.owner.address + offset
        return DeviceTensor(self.gpu, shape, self.dtype, self.owner, start)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.itemsize

    def copy_from(self, source: DeviceTensor) -> None:
        """Start copying a tensor of the same size and dtype."""
        self.gpu.copy_across(self.address, source.address, width=self.nbytes)

    def write(self, value: Any) -> None:
        """Overwrite it from numpy."""
        stored = np.broadcast_to(to_stored(value, self.dtype), self.shape)
        self.gpu.copy_in(self.address, np.ascontiguousarray(stored))

    def read(self) -> NDArray[Any]:
        """Copy it to numpy; bfloat16 as float32."""
        stored = np.empty(self.shape, STORED[self.dtype])
        self.gpu.copy_out(stored, self.address)
        self.gpu.synchronize()
        return to_numbers(stored, self.dtype)


class HostInputs:
    """Small inputs that the host computes for each step, copied to the GPU in one transfer.

    They are copied out of pinned memory. The host may run ``ahead`` steps ahead: each step's inputs have
    a staging buffer of their own until the GPU has read them. When all buffers are in use, `send` waits for
    the GPU once, which frees all.

    Noise is sent in the same way, 64 KB for each step of an image with 16,384 codes. The noise of a whole
    image is 38 MB; the GPU would be idle until all of it was generated.
    """

    def __init__(
        self, gpu: Gpu, tensors: Sequence[TensorSpec], axes: Mapping[str, int], *, ahead: int
    ) -> None:
        """Lay out the tensors; staging buffers are allocated when they are needed."""
        self.gpu, self.ahead = gpu, ahead
        self.layout: dict[str, tuple[int, tuple[int, ...], str]] = {}  # offset, shape, dtype
        self.size = 0
        for tensor in tensors:
            shape = tensor.sized(axes)
            self.layout[tensor.name] = self.size, shape, tensor.dtype
            size = prod(shape) * np.dtype(STORED[tensor.dtype]).itemsize
            self.size += -(-size // ALIGNMENT) * ALIGNMENT
        memory = gpu.allocate(self.size)
        self.tensors = {
            name: DeviceTensor(gpu, shape, dtype, memory, offset)
            for name, (offset, shape, dtype) in self.layout.items()
        }
        self.staging: list[StagingBuffer] = []
        self.used, self.epoch = 0, gpu.epoch

    def send(self, values: Mapping[str, Any]) -> None:
        """Start copying a value for each tensor."""
        if not self.tensors:
            return
        buffer = self._next_buffer()
        for name, array in buffer.arrays.items():
            array[...] = to_stored(values[name], self.tensors[name].dtype)
        self.gpu.copy_in(next(iter(self.tensors.values())).address, buffer.bytes)

    def _next_buffer(self) -> StagingBuffer:
        if self.epoch == self.gpu.epoch and self.used == self.ahead:
            self.gpu.synchronize()
        if self.epoch != self.gpu.epoch:  # the host has waited: what was sent has arrived
            self.epoch, self.used = self.gpu.epoch, 0
        if self.used == len(self.staging):  # a caller that waits after every step needs only one
            self._add_buffers(1 if not self.staging else self.ahead - 1)
        self.used += 1
        return self.staging[self.used - 1]

    def _add_buffers(self, count: int) -> None:
        pinned = self.gpu.pin(count * self.size)
        for start in range(0, count * self.size, self.size):
            block = pinned.bytes[start : start + self.size]
            arrays = {
                name: block[offset : offset + prod(shape) * np.dtype(STORED[dtype]).itemsize]
                .view(STORED[dtype])
                .reshape(shape)
                for name, (offset, shape, dtype) in self.layout.items()
            }
            self.staging.append(StagingBuffer(block, arrays, pinned))


@dataclass(frozen=True)
class StagingBuffer:
    """Pinned memory for the inputs of one step."""

    bytes: NDArray[np.uint8]
    arrays: dict[str, NDArray[Any]]  # by name, views of it
    owner: Memory


class TokenLog:
    """The ids that steps sample, kept on the GPU: (rows, steps, ...), a column per step."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], steps: int) -> None:
        """Prepare for the ids of steps: (rows,), or (rows, S) for several codes per position."""
        self.gpu, self.shape, self.steps = gpu, shape, steps
        self.used = steps

    def next(self) -> Column:
        """Return the memory of the next step's ids; it is allocated for ``steps`` steps at once."""
        if self.used == self.steps:
            rows, *of_step = self.shape
            self.log, self.used = DeviceTensor.zeros(self.gpu, (rows, self.steps, *of_step), "int64"), 0
        self.used += 1
        return Column(self.log, self.used - 1)


class Column(DeviceTensor):
    """The ids of one step (rows, ...). They are not contiguous in a log, so graphs are not bound to them."""

    def __init__(self, log: DeviceTensor, step: int) -> None:
        self.size = prod(log.shape[2:]) * log.itemsize  # bytes of one row's ids
        offset = log.address - log.owner.address + step * self.size
        super().__init__(log.gpu, (log.shape[0], *log.shape[2:]), log.dtype, log.owner, offset)
        self.log, self.step = log, step
        self.stride = log.shape[1] * self.size  # bytes from a row to the next

    def copy_from(self, ids: DeviceTensor) -> None:
        """Copy ids (rows, ...) that were just sampled."""
        size, rows = self.size, ids.shape[0]
        self.gpu.copy_across(
            self.address, ids.address, width=size, rows=rows, stride=size, to_stride=self.stride
        )

    def follows(self, previous: Column) -> bool:
        """Return True if these ids lie directly behind those of another step, in each row."""
        return self.log is previous.log and self.step == previous.step + 1

    def write(self, value: Any) -> None:
        """Raise TypeError: only graphs write sampled ids."""
        raise TypeError("sampled ids are written by graphs alone")

    def read(self) -> NDArray[Any]:
        """Copy it to numpy."""
        ids = np.empty(self.shape, STORED[self.dtype])
        self.gpu.copy_out(ids, self.address, stride=self.stride)
        self.gpu.synchronize()
        return ids


def join(columns: Sequence[Column]) -> DeviceTensor:
    """Return the ids of steps as (rows, steps, ...), contiguous; ids of successive steps are copied at once.

    Raises:
        ValueError: the steps had different numbers of rows.
    """
    first = columns[0]
    if shapes := {column.shape for column in columns} - {first.shape}:
        raise ValueError(f"ids of steps of shapes {first.shape} and {shapes.pop()} cannot be joined")
    rows, *of_step = first.shape
    joined = DeviceTensor.zeros(first.gpu, (rows, len(columns), *of_step), first.dtype)
    starts = [i for i, column in enumerate(columns) if not i or not column.follows(columns[i - 1])]
    for start, end in pairwise([*starts, len(columns)]):
        joined.gpu.copy_across(
            joined.address + start * first.size,
            columns[start].address,
            width=(end - start) * first.size,
            rows=rows,
            stride=columns[start].stride,
            to_stride=len(columns) * first.size,
        )
    return joined
