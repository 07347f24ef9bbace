"""A graph with its inputs and outputs at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from janus_export.runtimes.memory import Buffer, HostBuffer, element_type, is_buffer
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.providers import Device
from janus_modular.graph_specs import TensorSpec

WITH_WARNINGS = onnxruntime.RunOptions()
WITH_WARNINGS.log_severity_level = 2  # ONNX Runtime warns if a cache is copied instead of written in place
WITH_WARNINGS.add_run_config_entry("gpu_graph_id", "0")  # the default; an unset one is looked up by an error


class Binding:
    """The inputs and outputs of a graph, bound to addresses; binding the same one again costs nothing."""

    def __init__(self, session: onnxruntime.InferenceSession, device: Device) -> None:
        self.session, self.device = session, device
        self.io = session.io_binding()
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.values: dict[str, Any] = {}  # what `take` bound last
        self.buffers: dict[str, Buffer] = {}  # keeps the memory alive: a graph has only addresses

    def input(self, name: str, buffer: Buffer, shape: Sequence[int] | None = None) -> None:
        """Bind an input to a buffer, as if the buffer had this shape."""
        if self._is_new(name, buffer, shape) or buffer.memory != self.device.memory:  # others: copied at bind
            self.io.bind_input(name, *self._where(name, buffer))

    def take(self, tensor: TensorSpec, value: Any) -> Buffer:
        """Bind an input to a buffer or to numbers, a numpy array in its own memory; return the buffer."""
        if value is not None and value is self.values.get(tensor.name):
            buffer = self.buffers[tensor.name]
        else:
            buffer = value if is_buffer(value) else HostBuffer.of(value, tensor.dtype)
            copied = isinstance(value, np.ndarray) and not np.shares_memory(buffer.read(), value)
            self.values[tensor.name] = None if copied else value  # a copy would miss later changes
        self.input(tensor.name, buffer)
        return buffer

    def output(self, name: str, buffer: Buffer, shape: Sequence[int] | None = None) -> None:
        """Bind an output to a buffer, as if the buffer had this shape."""
        if self._is_new(name, buffer, shape):
            self.io.bind_output(name, *self._where(name, buffer))

    def run(self) -> None:
        """Run the graph; on return the outputs are written."""
        self.session.run_with_iobinding(self.io, WITH_WARNINGS)

    def _is_new(self, name: str, buffer: Buffer, shape: Sequence[int] | None) -> bool:
        location = buffer.address, tuple(buffer.shape if shape is None else shape)
        changed = self.bound.get(name) != location
        self.bound[name], self.buffers[name] = location, buffer
        return changed

    def _where(self, name: str, buffer: Buffer) -> tuple[str, int, object, tuple[int, ...], int]:
        address, shape = self.bound[name]
        return buffer.memory, buffer.index, element_type(buffer.dtype), shape, address
