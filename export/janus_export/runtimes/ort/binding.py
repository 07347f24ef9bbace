"""A graph with its inputs and outputs at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from janus_export.bundle.contract import Tensor
from janus_export.runtimes.memory import Buffer, HostBuffer, element_type, is_buffer
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.providers import Device

LOUD = onnxruntime.RunOptions()
LOUD.log_severity_level = 2  # warnings: a cache that is copied rather than written in place, say


class Binding:
    """Names bound to addresses; what is bound already is left alone, so that a step binds nothing."""

    def __init__(self, session: onnxruntime.InferenceSession, device: Device) -> None:
        self.session, self.device = session, device
        self.io = session.io_binding()
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.given: dict[str, Any] = {}
        self.kept: dict[str, Buffer] = {}  # a graph holds addresses only: the memory must live

    def input(self, name: str, buffer: Buffer, shape: Sequence[int] | None = None) -> None:
        """Let the graph read ``name`` from a buffer, as if it had this shape."""
        if self._is_new(name, buffer, shape) or buffer.memory != self.device.memory:  # else copied when bound
            self.io.bind_input(name, *self._where(name, buffer))

    def take(self, tensor: Tensor, given: Any) -> Buffer:
        """Let the graph read what it is given, numpy where it lies; return it as a buffer."""
        if given is not None and given is self.given.get(tensor.name):
            buffer = self.kept[tensor.name]
        else:
            buffer = given if is_buffer(given) else HostBuffer.of(given, tensor.dtype)
            copied = isinstance(given, np.ndarray) and not np.shares_memory(buffer.read(), given)
            self.given[tensor.name] = None if copied else given  # a copy would miss what changes in it
        self.input(tensor.name, buffer)
        return buffer

    def output(self, name: str, buffer: Buffer, shape: Sequence[int] | None = None) -> None:
        """Let the graph write ``name`` into a buffer, as if it had this shape."""
        if self._is_new(name, buffer, shape):
            self.io.bind_output(name, *self._where(name, buffer))

    def run(self) -> None:
        """Run the graph; on return the outputs are written."""
        self.session.run_with_iobinding(self.io, LOUD)

    def _is_new(self, name: str, buffer: Buffer, shape: Sequence[int] | None) -> bool:
        place = buffer.address, tuple(buffer.shape if shape is None else shape)
        changed = self.bound.get(name) != place
        self.bound[name], self.kept[name] = place, buffer
        return changed

    def _where(self, name: str, buffer: Buffer) -> tuple[str, int, object, tuple[int, ...], int]:
        address, shape = self.bound[name]
        return buffer.memory, buffer.index, element_type(buffer.dtype), shape, address
