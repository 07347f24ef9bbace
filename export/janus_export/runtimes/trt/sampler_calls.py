"""Graphs that sample the next ids, bound to addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_export.runtimes.trt.engine import Engine
from janus_export.runtimes.trt.memory import Column, DeviceTensor, HostInputs, TokenLog


class SamplerCall:
    """A graph that samples, for inputs of one shape: hidden states in; ids and embeddings out."""

    def __init__(
        self,
        engine: Engine,
        inputs: Sequence[Any],
        step_buffer: Callable[[str, int], DeviceTensor],
        *,
        steps: int,
        ahead: int,
    ) -> None:
        """Bind the graph to the inputs on the GPU; the other inputs are sent at every call.

        ``step_buffer(name, rows)`` returns the memory by which steps exchange a tensor; ``steps`` is for how
        many steps ids are allocated at once, ``ahead`` how many steps the host may run ahead.

        Raises:
            PromptError: the engine was not built for so many rows or images.
        """
        tensors = engine.contract.inputs
        axes = engine.contract.measure([np.shape(value) for value in inputs])
        [profile] = engine.profiles
        engine.require(profile, axes)
        on_gpu = {t.name: x for t, x in zip(tensors, inputs, strict=True) if isinstance(x, DeviceTensor)}
        self.names = [tensor.name for tensor in tensors]
        sent = [tensor for tensor in tensors if tensor.name not in on_gpu]
        self.host_inputs = HostInputs(engine.gpu, sent, axes, ahead=ahead)
        self.outputs: dict[str, DeviceTensor] = {}
        self.logs: dict[str, TokenLog] = {}
        self.columns: dict[str, Column] = {}
        for tensor in engine.contract.outputs:
            shape = tensor.sized(axes)
            is_x = tensor.name == "x"
            self.outputs[tensor.name] = (
                step_buffer("x", shape[0]) if is_x else DeviceTensor.zeros(engine.gpu, shape, tensor.dtype)
            )
            if tensor.dtype == "int64":
                self.logs[tensor.name] = TokenLog(engine.gpu, shape, steps)
        bound = {**on_gpu, **self.host_inputs.tensors, **self.outputs}
        self.binding = engine.bind(profile, axes, bound)

    def begin(self, inputs: Sequence[Any]) -> tuple[DeviceTensor, ...]:
        """Send the inputs that are not on the GPU; return the memory that the outputs will be in."""
        self.host_inputs.send(dict(zip(self.names, inputs, strict=True)))
        self.columns = {name: log.next() for name, log in self.logs.items()}
        return tuple(self.columns.get(name, tensor) for name, tensor in self.outputs.items())

    def log_ids(self) -> None:
        """Enqueue a copy of the sampled ids into their log, after the work that samples them."""
        for name, column in self.columns.items():
            column.copy_from(self.outputs[name])
