"""A session of a bundle's engines: tensors stay on the GPU; the host only sends small inputs of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import check_magnitude
from janus_export.runtimes.kv_cache import KVCache
from janus_export.runtimes.prompts import block_spans, chunks
from janus_export.runtimes.session import BundleSession
from janus_export.runtimes.trt.cuda_graphs import CapturedStep
from janus_export.runtimes.trt.engine import Binding
from janus_export.runtimes.trt.memory import ALIGNMENT, Column, DeviceTensor, HostInputs, join
from janus_export.runtimes.trt.sampler_calls import SamplerCall
from janus_modular import Sequence as Prompt
from janus_modular import refuse_not_finite
from janus_modular.positions import RowPositions

if TYPE_CHECKING:
    from janus_export.runtimes.trt.runtime import TensorRTRuntime


@dataclass(frozen=True)
class BoundStep:
    """The backbone bound for W positions a row."""

    binding: Binding
    host_inputs: HostInputs


class TensorRTSession(BundleSession):
    """A `janus_modular.Session`. Open a new one for every run, because it contains the cache.

    Only `to_host` waits for the GPU, and every ``sync_every`` steps the host does, so that progress is
    accurate. A graph that samples is deferred until the next call: if a step follows, both become one CUDA
    graph.
    """

    def __init__(self, runtime: TensorRTRuntime, max_seq_len: int, rows: int | None = None) -> None:
        """Prepare rows of up to ``max_seq_len`` positions; no memory is allocated yet."""
        super().__init__(runtime, max_seq_len, rows)
        self.runtime, self.gpu = runtime, runtime.gpu
        self.step_buffers: dict[tuple[str, tuple[int, ...]], DeviceTensor] = {}  # x and hidden, by shape
        self.sampler_calls: dict[Any, SamplerCall] = {}
        self.pending: SamplerCall | None = None
        self.unchecked: list[DeviceTensor] = []  # joined ids that are not on the host yet
        self.magnitudes: list[tuple[str, DeviceTensor]] = []  # with their graphs; not on the host yet
        self.allocate_rows(0)

    def allocate_rows(self, count: int) -> None:
        """Make ``count`` empty rows; their memory is allocated when they are written.

        Raises:
            PromptError: the engines were built for fewer rows.
        """
        gpu, capacity = self.gpu, self.runtime.engines.capacity
        backbone = self.runtime.engine("backbone")
        for profile in ("prefill", "decode") if count else ():
            backbone.require(profile, {"rows": count})
        self.max_feed = backbone.profiles["prefill"].axes["tokens"][2]
        self.kv_cache = KVCache(
            backbone.contract,
            lambda shape, dtype: DeviceTensor.zeros(gpu, shape, dtype),
            rows=count,
            capacity_for=lambda end: capacity,  # fixed in the engine
        )
        self.bound_steps: dict[int, BoundStep] = {}  # by W
        self.captured: dict[tuple[Binding, ...], CapturedStep] = {}

    def read_prompts(self, prompts: Sequence[Prompt], first_row: int) -> DeviceTensor:
        """Read prompts, a chunk of positions at a time, into their rows' part of the cache.

        Return the last hidden states (n, D). A shorter row's padding is written too, but masked until it is
        overwritten.
        """
        self._flush()
        x = self._embed(prompts, self._run_in_chunks)  # (n, T, D)
        self.kv_cache.reach(x.shape[1])
        rows, total, hidden_size = x.shape
        last = np.array([len(prompt) for prompt in prompts]) - 1
        caches, copies = self._caches_of(first_row, rows)
        engine, states = self.runtime.engine("backbone"), self._step_buffer("hidden", (rows, hidden_size))
        low, _, high = engine.profiles["prefill"].axes["tokens"]
        size = states.itemsize * hidden_size
        high = min(high, max(low, self.runtime.config.chunk))
        old_states, new_states = (self.kv_cache.state_buffers(rows) for _ in range(2))
        positions = RowPositions.of_prompts(self.position_axes, prompts)
        passes: dict[int, BoundStep] = {}  # by positions at once
        together = positions.blocks
        spans = (
            chunks(total, low, high, overlap=not self.has_states)
            if together is None
            else self._block_spans(together, low, high)
        )
        for start, count in spans:
            if count not in passes:
                passes[count] = self._bind_prompts(rows, count, {**caches, **old_states}, new_states)
            host_inputs, binding = passes[count].host_inputs, passes[count].binding
            index = np.tile(np.arange(start, start + count), (rows, 1))  # (n, t)
            padded = np.zeros((rows, count, hidden_size), x.dtype)
            padded[:, : total - start] = x[:, start : start + count]
            counts = np.clip(last + 1 - start, 0, count)
            inputs = self.kv_cache.host_inputs(
                index, positions.of(index), counts, together, positions.hidden_in()
            )
            host_inputs.send({"x": padded, **inputs})
            binding.enqueue()
            _copy(new_states, old_states)
            hidden = binding.tensors["hidden"]
            for row in np.flatnonzero((start <= last) & (last < start + count)).tolist():
                state = hidden.address + (row * count + int(last[row]) - start) * size
                self.gpu.copy_across(states.address + row * size, state, width=size)
        for name, buffer in self.kv_cache.old_states.items():
            assert isinstance(buffer, DeviceTensor)
            _copy({name: old_states[name]}, {name: buffer.rows(first_row, rows)})
        for target, copied in copies:
            target.copy_from(copied)
        self.gpu.hold(*passes.values())
        return states

    def feed(self, x: DeviceTensor | NDArray[Any], counts: NDArray[np.int64]) -> DeviceTensor:
        """Feed x (rows, W, D); return the hidden states (rows, W, D), the same memory for each W.

        One run of the engine takes all positions if each row has as many free positions; otherwise as many as
        fit into the fullest row. At least one position is always free: a session's rows end before
        the engine's last position, which is for the padding of full rows.
        """
        total = x.shape[1]
        source, hidden = self._exchange("x", total), self._exchange("hidden", total)
        if not (isinstance(x, DeviceTensor) and x.address == source.address):
            self._flush()  # the deferred graph may still use the memory that is overwritten here
            source.copy_from(x) if isinstance(x, DeviceTensor) else source.write(x)
        start = 0
        while start < total:
            lengths = self.lengths + np.minimum(counts, start)
            size = self._positions_at_once(total - start, lengths)
            kept = np.clip(counts - start, 0, size)
            if size == total:
                self._run_step(size, lengths, kept)
            else:
                count = min(size, total - start)
                part, states = self._exchange("x", size), self._exchange("hidden", size)
                self._copy_positions(part, 0, source, start, count)
                self._run_step(size, lengths, kept)
                self._copy_positions(hidden, start, states, 0, count)
            start += size
        return hidden

    def prompt_embeddings(self, prompts: Sequence[Prompt]) -> NDArray[Any]:
        """Return the embeddings (n, T, D) of prompts, on the host."""
        self._flush()
        return self._embed(prompts, self._run_in_chunks)

    def expand(self, x: DeviceTensor | NDArray[Any]) -> DeviceTensor | NDArray[Any]:
        """Return (n, D) as (n, 1, D), in the same memory."""
        return x.view((x.shape[0], 1, x.shape[1])) if isinstance(x, DeviceTensor) else x[:, None]

    def squeeze(self, x: DeviceTensor) -> DeviceTensor:
        """Return (n, 1, D) as (n, D), in the same memory."""
        return x.view((x.shape[0], x.shape[2]))

    def run(self, name: str, *inputs: Any) -> Any:
        """Run a graph by name; its outputs stay on the GPU until `to_host`."""
        self._flush()
        engine = self.runtime.engine(name)
        if not engine.contract.returns_x:
            outputs = list(self.runtime.enqueue(name, inputs))
            if self.runtime.measures(name):
                self.magnitudes.append((name, outputs.pop()))
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        inputs = tuple(self._at_fixed_address(f"{name} {i}", x) for i, x in enumerate(inputs))
        key = (name, *(x.address if isinstance(x, DeviceTensor) else np.shape(x) for x in inputs))
        if key not in self.sampler_calls:
            self.sampler_calls[key] = SamplerCall(
                engine,
                inputs,
                lambda name, rows: self._step_buffer(name, (rows, self.hidden_size)),
                steps=self.runtime.engines.capacity,
                ahead=self.runtime.config.sync_every,
            )
        self.pending = self.sampler_calls[key]
        return self.pending.begin(inputs)

    def take(self, tensors: Any, indices: Any) -> DeviceTensor:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D), on the GPU."""
        self._flush()
        several = tensors if isinstance(tensors, list | tuple) else [tensors]
        sources = [self._on_gpu(x) for x in several]
        order = np.asarray(indices, np.int64)
        hidden_size = sources[0].shape[-1]
        gathered = DeviceTensor.zeros(self.gpu, (*order.shape, hidden_size), sources[0].dtype)
        size = hidden_size * gathered.itemsize  # bytes of a vector
        addresses = np.concatenate(
            [source.address + np.arange(prod(source.shape[:-1])) * size for source in sources]
        )[order.reshape(-1)]
        starts = np.flatnonzero(np.diff(addresses, prepend=-1) != size)  # of runs of contiguous vectors
        for start, end in zip(starts, [*starts[1:], len(addresses)], strict=True):
            width = int(end - start) * size
            self.gpu.copy_across(gathered.address + int(start) * size, int(addresses[start]), width=width)
        self.gpu.hold(*sources)
        return gathered

    def stack(self, columns: Sequence[Column]) -> DeviceTensor:
        """Join the ids that successive steps sampled (rows, ...) as (rows, steps, ...), on the GPU."""
        self._flush()
        joined = join(columns)
        self.unchecked.append(joined)
        return joined

    def to_host(self, x: DeviceTensor | NDArray[Any]) -> NDArray[Any]:
        """Wait for a tensor of this session, and copy it to numpy.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite, these ids or ids that
                were joined earlier; or images were decoded from such values.
        """
        self._flush()
        if not isinstance(x, DeviceTensor):
            return refuse_not_finite(np.array(x))
        joined = [np.empty(ids.shape, np.int64) for ids in self.unchecked]
        measured = [(graph, np.empty(tensor.shape, np.float32)) for graph, tensor in self.magnitudes]
        for ids, array in zip(self.unchecked, joined, strict=True):
            self.gpu.copy_out(array, ids.address)
        for (_, tensor), (_, magnitude) in zip(self.magnitudes, measured, strict=True):
            self.gpu.copy_out(magnitude, tensor.address)
        read = x.read()  # also waits for all work enqueued before
        self.unchecked.clear()
        self.magnitudes.clear()
        for ids_read in (*joined, read):
            refuse_not_finite(ids_read)
        for graph, magnitude in measured:
            check_magnitude(graph, magnitude)
        return read

    def _flush(self) -> None:
        """Enqueue the graph that was deferred."""
        if self.pending:
            self._enqueue()

    def _enqueue(self, *bindings: Binding) -> None:
        """Enqueue the graph that was deferred, together with the work that follows it."""
        pending, self.pending = self.pending, None
        together = (pending.binding, *bindings) if pending else bindings
        if together not in self.captured:
            capture = self.runtime.config.cuda_graph
            self.captured[together] = CapturedStep(self.gpu, together, capture=capture)
        self.captured[together].run()
        if pending:
            pending.log_ids()

    def _positions_at_once(self, remaining: int, lengths: NDArray[np.int64]) -> int:
        """Return the number of positions per row in one run of the backbone, padding included."""
        low, _, high = self.runtime.engine("backbone").profiles["prefill"].axes["tokens"]
        free = self.kv_cache.capacity - int(lengths.max())
        size = max(min(remaining, free, high), low)
        return size if remaining > 1 and size <= free else 1

    def _run_step(self, size: int, lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Run the backbone on ``size`` positions per row, after these lengths; rows keep ``counts``."""
        if size not in self.bound_steps:
            self.bound_steps[size] = self._bind_step(size)
        step = self.bound_steps[size]
        index = lengths[:, None] + np.arange(size)  # (rows, W)
        positions = self.row_positions.of(index, last=self.max_seq_len - 1)
        unseen = self.row_positions.hidden_in()
        step.host_inputs.send(self.kv_cache.host_inputs(index, positions, counts, hidden=unseen))
        self._enqueue(step.binding)
        _copy(self.kv_cache.new_states, self.kv_cache.old_states)

    def _bind_step(self, positions: int) -> BoundStep:
        """Bind the tensors that steps of so many positions per row read and write."""
        cache = self.kv_cache
        axes = {"rows": len(self.lengths), "tokens": positions, "capacity": cache.capacity}
        host_inputs = HostInputs(self.gpu, cache.inputs, axes, ahead=self.runtime.config.sync_every)
        binding = self._bind_backbone(
            "decode" if positions == 1 else "prefill",
            axes,
            {**cache.buffers, **cache.old_states},
            host_inputs,
            x=self._exchange("x", positions),
            hidden=self._exchange("hidden", positions),
            **cache.outputs(cache.new_states),
        )
        return BoundStep(binding, host_inputs)

    def _block_spans(self, together: NDArray[np.int64], low: int, high: int) -> list[tuple[int, int]]:
        """Split prompts so that no block of positions that attend to each other is divided.

        Raises:
            PromptError: the engine takes fewer positions at once than a block has.
        """
        spans = block_spans(together, high)
        self.runtime.engine("backbone").require("prefill", {"tokens": max(size for _, size in spans)})
        return [(start, max(size, low)) for start, size in spans]

    def _bind_prompts(
        self, rows: int, positions: int, caches: Mapping[str, Any], new_states: Mapping[str, Any]
    ) -> BoundStep:
        """Bind the backbone for ``positions`` positions of prompts in ``rows`` rows."""
        axes = {"rows": rows, "tokens": positions, "capacity": self.kv_cache.capacity}
        x = next(tensor for tensor in self.runtime.engine("backbone").contract.inputs if tensor.name == "x")
        host_inputs = HostInputs(self.gpu, [*self.kv_cache.inputs, x], axes, ahead=1)
        hidden = DeviceTensor.zeros(self.gpu, x.sized(axes), self.runtime.dtype)
        outputs = self.kv_cache.outputs(new_states)
        binding = self._bind_backbone("prefill", axes, caches, host_inputs, hidden=hidden, **outputs)
        return BoundStep(binding, host_inputs)

    def _bind_backbone(
        self,
        profile: str,
        axes: Mapping[str, int],
        caches: Mapping[str, Any],
        host_inputs: HostInputs,
        **tensors: Any,
    ) -> Binding:
        """Bind the backbone, with every cache that it writes in place as both input and output."""
        engine = self.runtime.engine("backbone")
        written = {present: caches[past] for present, past in engine.contract.aliases.items()}
        return engine.bind(profile, axes, {**host_inputs.tensors, **caches, **written, **tensors})

    def _caches_of(
        self, first_row: int, rows: int
    ) -> tuple[dict[str, DeviceTensor], list[tuple[DeviceTensor, DeviceTensor]]]:
        """Return some rows of each cache, and (original, copy) for rows that are replaced by an aligned copy.

        Engines read and write only at aligned addresses.
        """
        caches, copies = dict[str, DeviceTensor](), []
        for name, buffer in self.kv_cache.buffers.items():
            assert isinstance(buffer, DeviceTensor)
            caches[name] = target = buffer.rows(first_row, rows)
            if target.address % ALIGNMENT:
                caches[name] = DeviceTensor.zeros(self.gpu, target.shape, target.dtype)
                copies.append((target, caches[name]))
        return caches, copies

    def _copy_positions(
        self, to: DeviceTensor, to_start: int, source: DeviceTensor, start: int, count: int
    ) -> None:
        """Copy ``count`` positions of each row of one tensor (rows, W, D) to another."""
        self._flush()
        size = self.hidden_size * to.itemsize
        self.gpu.copy_across(
            to.address + to_start * size,
            source.address + start * size,
            width=count * size,
            rows=to.shape[0],
            stride=source.shape[1] * size,
            to_stride=to.shape[1] * size,
        )

    def _run_in_chunks(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """Run a graph on a prompt, in several runs if the engine takes fewer tokens at once."""
        [profile] = self.runtime.engine(name).profiles.values()
        limit = profile.axes["tokens"][2] if "tokens" in profile.axes else value.shape[1]
        slices = [value[:, start : start + limit] for start in range(0, value.shape[1], limit)]
        return np.concatenate([self.runtime.run(name, tokens) for tokens in slices], axis=1)

    def _exchange(self, name: str, positions: int) -> DeviceTensor:
        """Return the memory (rows, W, D) of steps' x or hidden; for W 1, graphs that sample use it too."""
        rows, hidden_size = len(self.lengths), self.hidden_size
        if positions == 1:
            return self._step_buffer(name, (rows, hidden_size)).view((rows, 1, hidden_size))
        return self._step_buffer(name, (rows, positions, hidden_size))

    def _step_buffer(self, name: str, shape: tuple[int, ...]) -> DeviceTensor:
        if (name, shape) not in self.step_buffers:
            self.step_buffers[name, shape] = DeviceTensor.zeros(self.gpu, shape, self.runtime.dtype)
        return self.step_buffers[name, shape]

    def _at_fixed_address(self, name: str, x: Any) -> Any:
        """Return a tensor that `take` made as a copy in memory that stays: graphs are bound to addresses."""
        stays = {buffer.address for buffer in self.step_buffers.values()}
        if not isinstance(x, DeviceTensor) or x.dtype != self.runtime.dtype or x.address in stays:
            return x
        fixed = self._step_buffer(name, x.shape)
        fixed.copy_from(x)
        self.gpu.hold(x)
        return fixed

    def _on_gpu(self, x: DeviceTensor | NDArray[Any]) -> DeviceTensor:
        """Return a tensor of the GPU; numpy's is copied there."""
        if isinstance(x, DeviceTensor):
            return x
        copied = DeviceTensor.zeros(self.gpu, x.shape, self.runtime.dtype)
        copied.write(x)
        return copied


def _copy(sources: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Start copying tensors over those of the same names."""
    for name, source in sources.items():
        targets[name].copy_from(source)
