"""A session of a bundle in ONNX Runtime: rows of any length are admitted, extended in place, and freed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_export.runtimes.kv_cache import KVCache
from janus_export.runtimes.memory import (
    Buffer,
    HostBuffer,
    TokenLog,
    allocate,
    host,
    is_buffer,
    to_numbers,
    to_stored,
    view,
    view_rows,
)
from janus_export.runtimes.ort.binding import Binding
from janus_export.runtimes.prompts import block_spans
from janus_export.runtimes.session import BundleSession
from janus_modular import Sequence as Prompt
from janus_modular import refuse_not_finite
from janus_modular.graph_specs import TensorSpec
from janus_modular.positions import RowPositions

if TYPE_CHECKING:
    from janus_export.runtimes.ort.runtime import OnnxRuntime

SPARE_POSITIONS = 16
"""Extra positions of a GPU's cache, for padding of full rows; feeding more positions reallocates it."""


@dataclass(frozen=True)
class BoundStep:
    """The backbone with all inputs and outputs bound, for W positions a row."""

    binding: Binding
    x: Buffer  # (rows, W, D)
    host_inputs: Mapping[str, Buffer]  # positions (rows, W), and those of the cache
    hidden: Buffer  # (rows, W, D)


class OnnxSession(BundleSession):
    """A `janus_modular.Session`. Open a new one for every run, because it contains the cache.

    Steps exchange tensors in place: the backbone writes ``hidden``, graphs that sample read it and write
    ``x``, which the backbone reads. Addresses are bound once for each number of positions a row, and again
    when rows outgrow their capacity.
    """

    def __init__(self, runtime: OnnxRuntime, max_seq_len: int, rows: int | None = None) -> None:
        """Prepare rows of up to ``max_seq_len`` positions; no memory is allocated yet."""
        super().__init__(runtime, max_seq_len, rows)
        self.runtime = runtime
        self.step_buffers: dict[tuple[str, int], Buffer] = {}  # x and hidden (n, D), by name and n
        self.sampler_calls: dict[str, Binding] = {}
        self.token_logs: dict[tuple[str, tuple[int, ...]], TokenLog] = {}
        self.allocate_rows(0)

    def allocate_rows(self, count: int) -> None:
        """Make ``count`` empty rows; their memory is allocated when they are written."""
        device, limit = self.runtime.device, self.max_seq_len
        bucket = self.runtime.config.bucket

        def capacity_for(end: int) -> int:
            if device.memory == "cpu":
                return max(end, min(-(-end // bucket) * bucket, limit))
            return max(end, limit + SPARE_POSITIONS)

        self.kv_cache = KVCache(
            self.runtime.graph("backbone").contract,
            lambda shape, dtype: allocate(shape, dtype, device),
            rows=count,
            capacity_for=capacity_for,
        )
        self.bound_steps: dict[tuple[int, int, int], BoundStep] = {}  # by first row, number of rows, and W
        self.bound_capacity = 0  # of the cache that these are bound to

    def read_prompts(self, prompts: Sequence[Prompt], first_row: int) -> Buffer:
        """Read prompts, a chunk of positions at a time, into their rows' part of the cache.

        Return the last hidden states (n, D). A shorter row's padding is written too, but masked until it is
        overwritten.
        """
        x = self._embed(prompts, self.runtime.run)  # (n, T, D)
        count, total, hidden_size = x.shape
        last = np.array([len(prompt) for prompt in prompts]) - 1
        self.kv_cache.reach(total)
        caches = {name: view_rows(buffer, first_row, count) for name, buffer in self.kv_cache.buffers.items()}
        old_states, new_states = (self.kv_cache.state_buffers(count) for _ in range(2))
        positions = RowPositions.of_prompts(self.position_axes, prompts)
        states = np.empty((count, hidden_size), x.dtype)
        limit, together = self.runtime.config.chunk, positions.blocks
        blocks = np.zeros((1, total), np.int64) if together is None else together
        for start, size in block_spans(blocks, limit):
            chunk = np.ascontiguousarray(x[:, start : start + size])  # (n, t, D)
            index = np.tile(np.arange(start, start + chunk.shape[1]), (count, 1))  # (n, t)
            hidden = HostBuffer(np.empty(chunk.shape, x.dtype), self.runtime.dtype)
            counts = np.clip(last + 1 - start, 0, chunk.shape[1])
            inputs = self.kv_cache.host_inputs(
                index, positions.of(index), counts, together, positions.hidden_in()
            )
            self._bind_backbone(
                {**caches, **old_states},
                {"hidden": hidden, **self.kv_cache.outputs(new_states)},
                x=HostBuffer(chunk, self.runtime.dtype),
                **{name: HostBuffer.of(value, str(value.dtype)) for name, value in inputs.items()},
            ).run()
            _copy(new_states, old_states)
            ended = np.flatnonzero((start <= last) & (last < start + chunk.shape[1]))
            states[ended] = hidden.array[ended, last[ended] - start]
        for name, buffer in self.kv_cache.old_states.items():
            of_rows = buffer.read().copy()
            of_rows[first_row : first_row + count] = old_states[name].read()
            buffer.write(of_rows)
        return HostBuffer(states, self.runtime.dtype)

    def feed(self, x: Buffer | NDArray[Any], counts: NDArray[np.int64]) -> Buffer:
        """Feed x (rows, W, D); return the hidden states (rows, W, D), the same memory for each W."""
        return self.feed_rows(x, counts, 0)

    def feed_rows(self, x: Buffer | NDArray[Any], counts: NDArray[np.int64], first_row: int) -> Buffer:
        """Feed x (n, W, D) to the rows from ``first_row`` on; return their hidden states (n, W, D).

        Each row has W positions behind its length, a full row too: the cache grows for padding as well.
        """
        count, positions = x.shape[:2]
        if self.has_states and count < len(self.lengths):  # a state has no rows of its own to write to
            return super().feed_rows(x, counts, first_row)
        lengths = self.lengths[first_row : first_row + count]
        self.kv_cache.reach(int(lengths.max()) + positions)
        if self.bound_capacity != self.kv_cache.capacity:  # the cache was reallocated
            self.bound_steps.clear()
            self.bound_capacity = self.kv_cache.capacity
        step = self.bound_steps.get((first_row, count, positions)) or self._bind_step(
            first_row, count, positions
        )
        if not (is_buffer(x) and x.address == step.x.address):
            step.x.write(host(x))
        index = lengths[:, None] + np.arange(positions)  # (n, W)
        allowed = self.row_positions.of(index, last=self.max_seq_len - 1)
        unseen = self.row_positions.hidden_in(first_row, count)
        for name, value in self.kv_cache.host_inputs(index, allowed, counts, hidden=unseen).items():
            step.host_inputs[name].write(value)
        step.binding.run()
        _copy(self.kv_cache.new_states, self.kv_cache.old_states)
        return step.hidden

    def prompt_embeddings(self, prompts: Sequence[Prompt]) -> Buffer:
        """Return the embeddings (n, T, D) of prompts."""
        x = self._embed(prompts, self.runtime.run)
        return HostBuffer.of(x, self.runtime.dtype)

    def copy_positions(self, source: int, target: int, length: int) -> bool:
        """Copy what a row of the cache holds; False on a GPU, where it would go through the host."""
        buffers = self.kv_cache.buffers.values()
        if self.has_states or not all(isinstance(buffer, HostBuffer) for buffer in buffers):
            return False
        for buffer in buffers:
            buffer.read()[target, :, :length] = buffer.read()[source, :, :length]
        return True

    def expand(self, x: Buffer | NDArray[Any]) -> Buffer | NDArray[Any]:
        """Return (n, D) as (n, 1, D), in the same memory."""
        return x[:, None] if isinstance(x, np.ndarray) else view(x, (x.shape[0], 1, x.shape[1]))

    def squeeze(self, x: Buffer) -> Buffer:
        """Return (n, 1, D) as (n, D), in the same memory."""
        return view(x, (x.shape[0], x.shape[2]))

    def run(self, name: str, *inputs: Any) -> Any:
        """Run a graph by name; ids and embeddings of a graph that samples stay on the device."""
        graph = self.runtime.graph(name)
        if not graph.contract.returns_x:
            return self.runtime.run(name, *map(host, inputs))
        if name not in self.sampler_calls:
            self.sampler_calls[name] = Binding(graph.session, self.runtime.device)
        binding, axes = self.sampler_calls[name], dict[str, int]()
        for tensor, value in graph.contract.paired(inputs):
            axes |= tensor.measure(binding.take(tensor, value).shape)
        outputs = [self._output(name, tensor, tensor.sized(axes)) for tensor in graph.contract.outputs]
        for tensor, buffer in zip(graph.contract.outputs, outputs, strict=True):
            binding.output(tensor.name, buffer)
        binding.run()
        return tuple(outputs)

    def take(self, tensors: Any, indices: Any) -> Buffer:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D), on the host."""
        dtype = self.runtime.dtype
        several = tensors if isinstance(tensors, list | tuple) else [tensors]
        flat = [to_stored(host(x), dtype).reshape(-1, x.shape[-1]) for x in several]
        vectors = flat[0] if len(flat) == 1 else np.concatenate(flat)
        return HostBuffer(vectors[np.asarray(indices, np.int64)], dtype)

    def stack(self, columns: Sequence[Buffer]) -> NDArray[Any]:
        """Join the ids that successive steps sampled (rows, ...) as (rows, steps, ...).

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite(np.stack([host(column) for column in columns], axis=1))

    def to_host(self, x: Buffer | NDArray[Any]) -> NDArray[Any]:
        """Copy a tensor of this session to numpy.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite(to_numbers(host(x).copy(), x.dtype) if is_buffer(x) else host(x).copy())

    def _bind_step(self, first_row: int, count: int, positions: int) -> BoundStep:
        """Allocate and bind the tensors that steps of some rows read and write.

        Steps of one position, and steps of all rows, are kept: prompts are read in parts of any length.
        """
        device, capacity = self.runtime.device, self.kv_cache.capacity
        shape = (count, positions, self.hidden_size)
        if positions == 1:  # graphs that sample read and write the same memory
            x, hidden = (view(self._step_buffer(name, count), shape) for name in ("x", "hidden"))
        else:
            x, hidden = (allocate(shape, self.runtime.dtype, device) for _ in range(2))
        axes = {"rows": count, "tokens": positions, "capacity": capacity}
        host_inputs = {
            tensor.name: allocate(tensor.sized(axes), tensor.dtype, device) for tensor in self.kv_cache.inputs
        }
        cache = self.kv_cache
        caches = {name: view_rows(buffer, first_row, count) for name, buffer in cache.buffers.items()}
        binding = self._bind_backbone(
            {**caches, **cache.old_states},
            {"hidden": hidden, **cache.outputs(cache.new_states)},
            x=x,
            **host_inputs,
        )
        step = BoundStep(binding, x, host_inputs, hidden)
        if positions == 1 or count == len(self.lengths):
            self.bound_steps[first_row, count, positions] = step
        return step

    def _bind_backbone(
        self, caches: Mapping[str, Buffer], outputs: Mapping[str, Buffer], **inputs: Buffer
    ) -> Binding:
        """Bind the backbone, with every cache that it writes in place as both input and output."""
        graph = self.runtime.graph("backbone")
        binding = Binding(graph.session, self.runtime.device)
        for name, buffer in {**inputs, **caches}.items():
            binding.input(name, buffer)
        for present, past in graph.contract.aliases.items():
            binding.output(present, caches[past])
        for name, buffer in outputs.items():
            binding.output(name, buffer)
        return binding

    def _output(self, graph: str, tensor: TensorSpec, shape: tuple[int, ...]) -> Buffer:
        """Return the memory of an output: the backbone's input, a log of ids, or memory of its own."""
        if tensor.name == "x":
            return self._step_buffer("x", shape[0])
        if tensor.dtype == "int64":
            log = self.token_logs.setdefault((graph, shape), TokenLog(shape, self.runtime.device))
            return log.next()
        return allocate(shape, tensor.dtype, self.runtime.device)

    def _step_buffer(self, name: str, rows: int) -> Buffer:
        if (name, rows) not in self.step_buffers:
            shape = (rows, self.hidden_size)
            self.step_buffers[name, rows] = allocate(shape, self.runtime.dtype, self.runtime.device)
        return self.step_buffers[name, rows]


def _copy(sources: Mapping[str, Buffer], targets: Mapping[str, Buffer]) -> None:
    """Overwrite buffers by others of the same names."""
    for name, source in sources.items():
        targets[name].write(source.read())
