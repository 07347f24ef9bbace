"""One run of a bundle in ONNX Runtime: rows of any length that go on step by step, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import Tensor
from janus_export.runtimes.kv_cache import Slots
from janus_export.runtimes.memory import Buffer, HostBuffer, Log, allocate, host, is_buffer, to_numbers
from janus_export.runtimes.ort.binding import Binding
from janus_export.runtimes.prompts import embed
from janus_modular import Sequence as Prompt
from janus_modular import refuse_not_finite

if TYPE_CHECKING:
    from janus_export.runtimes.ort.runtime import OnnxRuntime


class OnnxSession:
    """A `janus_modular.Session`. Open one for every run: it holds the cache.

    What steps hand to each other stays where it is: the backbone writes ``hidden``, the parts that choose
    read it and write ``x``, which the backbone reads. Addresses are bound once, and again when rows
    outgrow their slots.
    """

    def __init__(self, runtime: OnnxRuntime, capacity: int) -> None:
        """Prepare rows with room for ``capacity`` positions; how many there are, the prompts say."""
        self.runtime = runtime
        self.capacity = capacity
        model = runtime.bundle.manifest["model"]
        self.vocab_size: int = model["vocab_size"]
        self.pad_id: int = model["pad_id"]
        self.image_positions: int = model["image_target"]["positions"]
        self.sizes: Mapping[str, Any] = model["sizes"]
        self.slots = self._slots(0)
        self.between: dict[tuple[str, int], Buffer] = {}  # x and hidden, by rows
        self.choosing: dict[str, Binding] = {}
        self.logs: dict[tuple[str, tuple[int, ...]], Log] = {}

    def prefill(self, prompts: Sequence[Prompt]) -> Buffer:
        """Read one prompt a row, a chunk of positions at a time; return the last hidden states (rows, D)."""
        x = embed(prompts, self.runtime.run, images_at_once=self.runtime.config.images)  # (R, T, D)
        last = np.array([len(prompt) for prompt in prompts]) - 1
        self.slots = self._slots(len(prompts))
        self.slots.reach(x.shape[1])
        hidden = np.empty((len(prompts), x.shape[2]), x.dtype)
        for start in range(0, x.shape[1], self.runtime.config.chunk):
            chunk = self._read(x[:, start : start + self.runtime.config.chunk], start)  # (R, t, D)
            here = np.flatnonzero((start <= last) & (last < start + chunk.shape[1]))
            hidden[here] = chunk[here, last[here] - start]
        self.slots.lengths[:] = last + 1
        self._bind_step()
        return HostBuffer(hidden, self.runtime.dtype)

    def step(self, x: Buffer | NDArray[Any], active: NDArray[np.bool_] | None = None) -> Buffer:
        """Feed one embedding a row (rows, D); rows that are not active stay where they are."""
        slots = self.slots
        if slots.reach(int(slots.lengths.max()) + 1):
            self._bind_step()
        if x is not self.x:
            self.x.write(host(x))
        at = slots.lengths[:, None]  # (R, 1)
        self.positions.write(at)
        self.write_index.write(slots.lengths)
        self.mask.write(slots.visible(at))
        self.stepping.run()
        slots.lengths += 1 if active is None else active
        return self.hidden

    def run(self, part: str, *inputs: Any) -> Any:
        """Run a part by name; what it chooses (``sample_...``) stays on the device until it is asked for."""
        if not part.startswith("sample_"):
            return self.runtime.run(part, *map(host, inputs))
        graph = self.runtime.graph(part)
        if part not in self.choosing:
            self.choosing[part] = Binding(graph.session, self.runtime.device)
        binding, axes = self.choosing[part], dict[str, int]()
        for tensor, given in zip(graph.contract.inputs, inputs, strict=True):
            axes |= tensor.measure(binding.take(tensor, given).shape)
        outputs = [self._place(part, tensor, tensor.sized(axes)) for tensor in graph.contract.outputs]
        for tensor, buffer in zip(graph.contract.outputs, outputs, strict=True):
            binding.output(tensor.name, buffer)
        binding.run()
        return tuple(outputs)

    def stack(self, columns: Sequence[Buffer]) -> NDArray[Any]:
        """Join what successive steps chose (rows, ...) as (rows, steps, ...).

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite(np.stack([host(column) for column in columns], axis=1))

    def to_host(self, x: Buffer | NDArray[Any]) -> NDArray[Any]:
        """Bring a tensor of this session's to numpy.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite(to_numbers(host(x).copy(), x.dtype) if is_buffer(x) else host(x).copy())

    def _slots(self, rows: int) -> Slots:
        device, limit = self.runtime.device, self.capacity
        bucket = self.runtime.config.bucket if device.memory == "cpu" else limit
        return Slots(
            self.runtime.graph("backbone").contract,
            lambda shape, dtype: allocate(shape, dtype, device),
            rows=rows,
            limit=limit,
            room=lambda end: min(-(-end // bucket) * bucket, limit),
        )

    def _read(self, x: NDArray[Any], start: int) -> NDArray[Any]:
        """Run the backbone over positions ``start`` on of every row (R, t, D); return its states, same shape.

        A shorter row's padding is written too, where nobody sees it until it is overwritten.
        """
        rows, count, _ = x.shape
        at = np.tile(np.arange(start, start + count), (rows, 1))  # (R, t)
        hidden = HostBuffer(np.empty(x.shape, x.dtype), self.runtime.dtype)
        binding = self._backbone(
            x=HostBuffer(np.ascontiguousarray(x), self.runtime.dtype),
            positions=HostBuffer(at, "int64"),
            mask=HostBuffer(self.slots.visible(at), "bool"),
            write_index=HostBuffer(at[:, 0].copy(), "int64"),
        )
        binding.output("hidden", hidden)
        binding.run()
        return hidden.array

    def _bind_step(self) -> None:
        """Bind what steps read and write; the slots have moved, or there are new rows."""
        rows, device = len(self.slots.lengths), self.runtime.device
        self.x, self.hidden = self._between("x", rows), self._between("hidden", rows)
        self.positions = allocate((rows, 1), "int64", device)
        self.write_index = allocate((rows,), "int64", device)
        self.mask = allocate((rows, 1, 1, self.slots.capacity), "bool", device)
        self.stepping = self._backbone(positions=self.positions, mask=self.mask, write_index=self.write_index)
        wide = (rows, 1, self.runtime.hidden_size)
        self.stepping.input("x", self.x, wide)
        self.stepping.output("hidden", self.hidden, wide)

    def _backbone(self, **inputs: Buffer) -> Binding:
        """Bind the backbone's inputs, and every cache as what it reads and what it writes."""
        graph = self.runtime.graph("backbone")
        binding = Binding(graph.session, self.runtime.device)
        for name, buffer in (inputs | self.slots.buffers).items():
            binding.input(name, buffer)
        for present, past in graph.contract.aliases.items():
            binding.output(present, self.slots.buffers[past])
        return binding

    def _place(self, part: str, tensor: Tensor, shape: tuple[int, ...]) -> Buffer:
        """Return where an output goes: the backbone's input, a log of choices, or memory of its own."""
        if tensor.name == "x":
            return self._between("x", shape[0])
        if tensor.dtype == "int64":
            return self.logs.setdefault((part, shape), Log(shape, self.runtime.device)).next()
        return allocate(shape, tensor.dtype, self.runtime.device)

    def _between(self, name: str, rows: int) -> Buffer:
        if (name, rows) not in self.between:
            shape = (rows, self.runtime.hidden_size)
            self.between[name, rows] = allocate(shape, self.runtime.dtype, self.runtime.device)
        return self.between[name, rows]
