"""Memory that graphs read and write in place: bound by address, so that nothing is copied."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from janus_export.runtimes.ort.providers import Device

BFLOAT16 = 16  # ONNX's type number of bfloat16; numpy lacks it, so its bits are stored as uint16
STORED: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "bool": np.bool_,
    "uint8": np.uint8,
}
"""The numpy dtypes that store a manifest's dtypes."""


def element_type(dtype: str) -> Any:
    """Return ONNX Runtime's name for a manifest's dtype."""
    return BFLOAT16 if dtype == "bfloat16" else STORED[dtype]


def to_stored(value: Any, dtype: str) -> NDArray[Any]:
    """Convert numbers to the storage of a manifest's dtype; bfloat16 is rounded to nearest even."""
    array = np.asarray(value)
    if dtype != "bfloat16" or array.dtype == STORED[dtype]:
        return np.asarray(array, STORED[dtype])
    bits = np.asarray(array, np.float32).view(np.uint32)
    quantized = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(array), 0x7FC0, quantized).astype(np.uint16)


def to_numbers(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Convert the storage of a manifest's dtype to numbers; bfloat16 bits become float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored


class Buffer(Protocol):
    """A tensor at a fixed address. Samplers pass buffers on without looking inside."""

    shape: tuple[int, ...]
    dtype: str
    memory: str  # "cpu" or "cuda"
    index: int
    address: int

    def write(self, value: Any) -> None:
        """Overwrite it from numpy."""
        ...

    def read(self) -> NDArray[Any]:
        """Return it as numpy; on a CPU the memory is shared."""
        ...


class HostBuffer:
    """A numpy array that graphs on a CPU write into."""

    memory, index = "cpu", 0

    def __init__(self, array: NDArray[Any], dtype: str) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("memory that graphs are bound to must be contiguous")
        self.array, self.dtype = array, dtype
        self.shape, self.address = array.shape, array.ctypes.data

    @classmethod
    def of(cls, value: Any, dtype: str) -> HostBuffer:
        """Return numbers as a buffer, in the memory of a numpy array where its dtype and layout fit."""
        return cls(np.asarray(to_stored(value, dtype), order="C"), dtype)

    def write(self, value: Any) -> None:
        """Overwrite it."""
        self.array[...] = to_stored(value, self.dtype)

    def read(self) -> NDArray[Any]:
        """Return the array itself."""
        return self.array


class DeviceBuffer:
    """Memory of a GPU (or of ONNX Runtime's own CPU allocator)."""

    def __init__(self, shape: tuple[int, ...], dtype: str, memory: str, index: int) -> None:
        from janus_export.runtimes.ort.library import onnxruntime

        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type(dtype), memory, index
        )
        self.shape, self.dtype, self.memory, self.index = shape, dtype, memory, index
        self.address = self.value.data_ptr()

    def write(self, value: Any) -> None:
        """Overwrite it."""
        stored = np.broadcast_to(to_stored(value, self.dtype), self.shape)
        self.value.update_inplace(np.ascontiguousarray(stored))

    def read(self) -> NDArray[Any]:
        """Copy it to the host."""
        return self.value.numpy()


def allocate(shape: tuple[int, ...], dtype: str, device: Device) -> Buffer:
    """Return zeroed memory of a device: uninitialised memory may contain NaN, which masks do not remove."""
    if device.memory == "cpu":
        return HostBuffer(np.zeros(shape, STORED[dtype]), dtype)
    buffer = DeviceBuffer(shape, dtype, device.memory, device.index)
    buffer.write(0)
    return buffer


class BufferView:
    """A view of device memory: a part of it, or all of it in another shape."""

    def __init__(self, buffer: Buffer, shape: tuple[int, ...], start: int) -> None:
        self.buffer, self.shape, self.start = buffer, shape, start
        self.dtype, self.memory, self.index = buffer.dtype, buffer.memory, buffer.index
        self.address = buffer.address + start * np.dtype(STORED[buffer.dtype]).itemsize

    def write(self, value: Any) -> None:
        """Overwrite the view if it covers its whole buffer.

        Raises:
            TypeError: the view is a part of its buffer; only graphs write parts.
        """
        if prod(self.shape) != prod(self.buffer.shape):
            raise TypeError(f"a part of a buffer ({self.shape} of {self.buffer.shape}) is written by graphs")
        stored = np.broadcast_to(to_stored(value, self.dtype), self.shape)
        self.buffer.write(stored.reshape(self.buffer.shape))

    def read(self) -> NDArray[Any]:
        """Copy it to the host."""
        return self.buffer.read().reshape(-1)[self.start : self.start + prod(self.shape)].reshape(self.shape)


def view(buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
    """Return the elements of a buffer from ``start`` on, in this shape and in the same memory."""
    if isinstance(buffer, HostBuffer):
        flat = buffer.array.reshape(-1)
        return HostBuffer(flat[start : start + prod(shape)].reshape(shape), buffer.dtype)
    return BufferView(buffer, shape, start)


def view_rows(buffer: Buffer, first: int, count: int) -> Buffer:
    """Return ``count`` rows of a buffer, along its first axis, in the same memory."""
    shape = buffer.shape[1:]
    return view(buffer, (count, *shape), first * prod(shape))


def is_buffer(x: Any) -> TypeGuard[Buffer]:
    """Return True if a tensor is bound memory rather than numpy."""
    return isinstance(x, HostBuffer | DeviceBuffer | BufferView)


def host(x: Any) -> NDArray[Any]:
    """Return a tensor as numpy; the memory may be shared."""
    return x.read() if is_buffer(x) else np.asarray(x)


class TokenLog:
    """The ids that steps sample, one row per step; they stay on the device until they are read."""

    BLOCK = 256  # steps that are allocated at once

    def __init__(self, shape: tuple[int, ...], device: Device) -> None:
        """Prepare for the ids of steps: (rows,), or (rows, S) for several codes per position."""
        self.shape, self.device = shape, device
        self.used = self.BLOCK

    def next(self) -> Buffer:
        """Return the memory of the next step's ids."""
        if self.used == self.BLOCK:
            self.block, self.used = allocate((self.BLOCK, *self.shape), "int64", self.device), 0
        self.used += 1
        return view(self.block, self.shape, (self.used - 1) * prod(self.shape))
