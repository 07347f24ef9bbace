"""A stand-in for CUDA: memory by address, one stream whose work is done when somebody waits for it, graphs.

It is stricter than a GPU. Work is put off until a synchronisation, so that one that is missing, and a host
buffer that is overwritten too early, give wrong numbers every time. Fresh memory is full of NaN. Addresses
are looked up: who reads or writes beside what was allocated fails. Everything is written into a log.
"""

# ruff: noqa: N801, N802, N815 - CUDA's names

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK, INVALID = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue
UNSUPPORTED = cudaError_t.cudaErrorStreamCaptureUnsupported
INVALIDATED = cudaError_t.cudaErrorStreamCaptureInvalidated
STREAM = 7  # the handle of the only one there is


@dataclass
class Block:
    """Memory that was allocated."""

    kind: str  # "device" or "pinned"
    address: int
    size: int
    keep: Any  # what holds it


@dataclass
class Machine:
    """A GPU that is none."""

    arch: tuple[int, int] = (8, 9)
    count: int = 1
    room: int = 1 << 30  # bytes
    blocks: dict[int, Block] = field(default_factory=dict)
    queue: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    spoilt: bool = False  # what is being recorded
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    log: list[tuple[Any, ...]] = field(default_factory=list)

    def note(self, what: str, *how: Any) -> None:
        self.log.append((what, *how))

    def counted(self, what: str) -> int:
        return sum(entry[0] == what for entry in self.log)

    def put(self, work: Callable[[], None]) -> None:
        """Put work on the stream, or into the graph that is being recorded."""
        (self.queue if self.recording is None else self.recording).append(work)

    def drain(self) -> None:
        """Do what is on the stream."""
        work, self.queue = self.queue, []
        for one in work:
            one()

    def forbid(self) -> bool:
        """Say whether a graph is being recorded, which what was called spoils."""
        self.spoilt = self.recording is not None
        return self.spoilt

    def allocate(self, kind: str, size: int) -> int:
        keep = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        address = -(-keep.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = Block(kind, address, size, keep)
        self.note("allocate", kind, size)
        return address

    def owner(self, address: int, size: int) -> Block | None:
        """Find the block that holds these bytes."""
        for block in self.blocks.values():
            if block.address <= address and address + size <= block.address + block.size:
                return block
        return None

    def demand(self, address: int, size: int) -> None:
        """Fail where bytes are not the GPU's."""
        block = self.owner(address, size)
        assert block is not None, f"{size} bytes at {address:#x} were never allocated, or given back"
        assert block.kind == "device", f"{size} bytes at {address:#x} are the host's"

    def runtime(self) -> ModuleType:
        """Return what stands in for ``cuda.bindings.runtime``."""
        module = ModuleType("cuda.bindings.runtime")
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(module, name, getattr(self, name))
        for kind in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode):
            setattr(module, kind.__name__, kind)
        module.cudaStreamNonBlocking = 1
        return module

    # From here on: the binding's own names, arguments and answers.

    def cudaGetErrorString(self, error):
        return OK, error.name.encode()

    def cudaGetDeviceCount(self):
        return (OK, self.count) if self.count else (cudaError_t.cudaErrorNoDevice, 0)

    def cudaSetDevice(self, device):
        return (OK,)

    def cudaGetDeviceProperties(self, device):
        major, minor = self.arch
        return OK, SimpleNamespace(name=b"Stand-in", major=major, minor=minor)

    def cudaStreamCreateWithFlags(self, flags):
        return OK, STREAM

    def cudaStreamSynchronize(self, stream):
        if self.forbid():
            return (UNSUPPORTED,)
        self.note("synchronize")
        self.drain()
        return (OK,)

    def cudaMalloc(self, size):
        if self.forbid():
            return UNSUPPORTED, None
        if sum(block.size for block in self.blocks.values()) + size > self.room:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return OK, self.allocate("device", size)

    def cudaMallocHost(self, size):
        return (UNSUPPORTED, None) if self.forbid() else (OK, self.allocate("pinned", size))

    def cudaFree(self, address):
        if self.forbid():
            return (UNSUPPORTED,)
        block = self.blocks.pop(address, None)
        if block is None:
            return (INVALID,)
        block.keep.fill(0xFF)
        return (OK,)

    def cudaFreeHost(self, address):
        return self.cudaFree(address)

    def cudaMemsetAsync(self, address, value, size, stream):
        def work():
            self.demand(address, size)
            ctypes.memset(address, value, size)

        assert stream == STREAM
        self.put(work)
        return (OK,)

    def cudaMemcpyAsync(self, to, start, size, kind, stream):
        return self.cudaMemcpy2DAsync(to, size, start, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(self, to, to_stride, start, stride, width, rows, kind, stream):
        if min(to_stride, stride) < width:
            return (INVALID,)
        size = width * rows
        reads_device = kind != cudaMemcpyKind.cudaMemcpyHostToDevice
        pageable = not reads_device and self.owner(start, size) is None

        def work():
            if reads_device:
                self.demand(start, stride * (rows - 1) + width)
            elif not pageable:
                assert self.owner(start, size), "pinned memory was given back before it was read"
            if kind != cudaMemcpyKind.cudaMemcpyDeviceToHost:
                self.demand(to, to_stride * (rows - 1) + width)
            for row in range(rows):
                ctypes.memmove(to + row * to_stride, start + row * stride, width)

        assert stream == STREAM
        self.note("copy", kind.name.removeprefix("cudaMemcpy"), size, "pageable" if pageable else "")
        if pageable:  # CUDA reads such memory at once
            if self.forbid():
                return (UNSUPPORTED,)
            self.drain()
            work()
        else:
            self.put(work)
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.recording is None
        self.recording, self.spoilt = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        work, self.recording = self.recording, None
        if self.spoilt:
            return INVALIDATED, None
        self.note("capture")
        self.graphs[len(self.graphs) + 1] = work
        return OK, len(self.graphs)

    def cudaGraphInstantiate(self, graph, flags):
        return OK, graph

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        self.graphs[graph] = None
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        assert stream == STREAM
        if self.forbid():
            return (UNSUPPORTED,)
        self.note("launch", graph)
        self.queue.extend(self.graphs[graph])
        return (OK,)
