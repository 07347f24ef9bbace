"""One run of a bundle's engines: everything stays on the GPU, and the host only tells it what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bundle.contract import check_magnitude
from janus_export.runtimes.kv_cache import Slots
from janus_export.runtimes.prompts import embed
from janus_export.runtimes.trt.cuda_graphs import Repeated
from janus_export.runtimes.trt.engine import Binding
from janus_export.runtimes.trt.memory import Column, DeviceTensor, Feed, join
from janus_export.runtimes.trt.samplers import Chooser
from janus_modular import Sequence as Prompt
from janus_modular import refuse_not_finite

if TYPE_CHECKING:
    from janus_export.runtimes.trt.runtime import TensorRTRuntime

TOLD = ("positions", "mask", "write_index")
"""What the host works out for the backbone; all else is on the GPU already."""


class TensorRTSession:
    """A `janus_modular.Session`. Open one for every run: it holds the cache.

    Nothing waits but `to_host` (and, every ``sync_every`` steps, the host for the GPU, so that progress is
    true). A part that chooses is put off until it is known what follows: with a step behind it, both
    become one CUDA graph.
    """

    def __init__(self, runtime: TensorRTRuntime, capacity: int) -> None:
        """Prepare rows with room for ``capacity`` positions; how many there are, the prompts say."""
        self.runtime, self.gpu, self.capacity = runtime, runtime.gpu, capacity
        model = runtime.bundle.manifest["model"]
        self.vocab_size: int = model["vocab_size"]
        self.pad_id: int = model["pad_id"]
        self.image_positions: int = model["image_target"]["positions"]
        self.sizes: Mapping[str, Any] = model["sizes"]
        self.slots = self._slots(0)
        self.between: dict[tuple[str, int], DeviceTensor] = {}  # x and hidden, by rows
        self.choosers: dict[Any, Chooser] = {}
        self.pending: Chooser | None = None
        self.repeated: dict[tuple[Binding, ...], Repeated] = {}
        self.unchecked: list[DeviceTensor] = []  # ids that were joined and not yet on the host
        self.magnitudes: list[tuple[str, DeviceTensor]] = []  # by graph; not yet on the host either

    def prefill(self, prompts: Sequence[Prompt]) -> DeviceTensor:
        """Read one prompt a row, a chunk of positions at a time; return the last hidden states (rows, D).

        Raises:
            PromptError: a prompt is longer than the session, or the engines were built for fewer rows.
        """
        self._flush()
        backbone, rows = self.runtime.engine("backbone"), len(prompts)
        for profile in ("prefill", "decode"):
            backbone.require(profile, {"rows": rows})
        slots = self._slots(rows)
        slots.require(max(map(len, prompts)))
        x = embed(prompts, self._part, images_at_once=self.runtime.config.images)  # (R, T, D)
        self.slots, self.repeated = slots, {}
        self.slots.reach(x.shape[1])
        self.x, self.hidden = self._between("x", rows), self._between("hidden", rows)
        last = np.array([len(prompt) for prompt in prompts]) - 1
        self._read(x, last)
        self.slots.lengths[:] = last + 1
        self._bind_step()
        return self.hidden

    def step(self, x: DeviceTensor | NDArray[Any], active: NDArray[np.bool_] | None = None) -> DeviceTensor:
        """Feed one embedding a row (rows, D); rows that are not active stay where they are."""
        slots = self.slots
        slots.reach(int(slots.lengths.max()) + 1)
        if x is not self.x:
            self._flush()  # it may still write what is overwritten here
            self.x.write(x.read() if isinstance(x, DeviceTensor) else x)
        at = slots.lengths[:, None]  # (R, 1)
        self.told.send({"positions": at, "mask": slots.visible(at), "write_index": slots.lengths})
        self._run(self.stepping)
        slots.lengths += 1 if active is None else active
        return self.hidden

    def run(self, part: str, *inputs: Any) -> Any:
        """Run a part by name; what it chooses (``sample_...``) stays on the GPU until it is asked for."""
        self._flush()
        if not part.startswith("sample_"):
            made = list(self.runtime.enqueue(part, inputs))
            if self.runtime.measures(part):
                self.magnitudes.append((part, made.pop()))
            return made[0] if len(made) == 1 else tuple(made)
        engine = self.runtime.engine(part)
        key = (part, *(x.address if isinstance(x, DeviceTensor) else np.shape(x) for x in inputs))
        if key not in self.choosers:
            self.choosers[key] = Chooser(
                engine, inputs, self._between, steps=self.slots.capacity, ahead=self.runtime.config.sync_every
            )
        self.pending = self.choosers[key]
        return self.pending.begin(inputs)

    def stack(self, columns: Sequence[Column]) -> DeviceTensor:
        """Join what successive steps chose (rows, ...) as (rows, steps, ...), on the GPU."""
        self._flush()
        joined = join(columns)
        self.unchecked.append(joined)
        return joined

    def to_host(self, x: DeviceTensor | NDArray[Any]) -> NDArray[Any]:
        """Wait for a tensor of this session's, and bring it to numpy.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite, these or those that were
                joined before; or images were decoded from such values.
        """
        self._flush()
        if not isinstance(x, DeviceTensor):
            return refuse_not_finite(np.array(x))
        joined = [np.empty(ids.shape, np.int64) for ids in self.unchecked]
        measured = [(graph, np.empty(one.shape, np.float32)) for graph, one in self.magnitudes]
        for ids, array in zip(self.unchecked, joined, strict=True):
            self.gpu.copy_out(array, ids.address)
        for (_, tensor), (_, magnitude) in zip(self.magnitudes, measured, strict=True):
            self.gpu.copy_out(magnitude, tensor.address)
        read = x.read()  # waits, for what was put on the stream before too
        self.unchecked.clear()
        self.magnitudes.clear()
        for ids_read in (*joined, read):
            refuse_not_finite(ids_read)
        for graph, magnitude in measured:
            check_magnitude(graph, magnitude)
        return read

    def _flush(self) -> None:
        """Put on the stream what was put off."""
        if self.pending:
            self._run()

    def _run(self, *then: Binding) -> None:
        """Put on the stream what was put off, and what follows it, together."""
        pending, self.pending = self.pending, None
        bindings = (pending.binding, *then) if pending else then
        if bindings not in self.repeated:
            capture = self.runtime.config.cuda_graph
            self.repeated[bindings] = Repeated(self.gpu, bindings, capture=capture)
        self.repeated[bindings].run()
        if pending:
            pending.keep()

    def _part(self, name: str, given: NDArray[Any]) -> NDArray[Any]:
        """Run a part of the prompt; more words than an engine takes at once in several pieces."""
        [profile] = self.runtime.engine(name).profiles.values()
        most = profile.axes["tokens"][2] if "tokens" in profile.axes else given.shape[1]
        pieces = [given[:, start : start + most] for start in range(0, given.shape[1], most)]
        return np.concatenate([self.runtime.run(name, piece) for piece in pieces], axis=1)

    def _read(self, x: NDArray[Any], last: NDArray[np.int64]) -> None:
        """Run the backbone over prompts (R, T, D); keep the states of each row's last position.

        A shorter row's padding is written too, where nobody sees it until it is overwritten.
        """
        rows, total, width = x.shape
        engine = self.runtime.engine("backbone")
        low, _, high = engine.profiles["prefill"].axes["tokens"]
        size = self.hidden.itemsize * width
        cut = chunks(total, low, min(high, max(low, self.runtime.config.chunk)))
        count = cut[0][1]
        axes = {"rows": rows, "tokens": count, "capacity": self.slots.capacity}
        told = [one for one in engine.contract.inputs if one.name in (*TOLD, "x")]
        feed = Feed(self.gpu, told, axes, ahead=1)
        hidden = DeviceTensor.zeros(self.gpu, (rows, count, width), self.hidden.dtype)
        binding = self._bind("prefill", axes, feed, hidden=hidden)
        for start, _ in cut:
            at = np.tile(np.arange(start, start + count), (rows, 1))  # (R, t)
            words = np.zeros((rows, count, width), x.dtype)
            words[:, : total - start] = x[:, start : start + count]
            feed.send({"x": words, "positions": at, "mask": self.slots.visible(at), "write_index": at[:, 0]})
            binding.enqueue()
            for row in np.flatnonzero((start <= last) & (last < start + count)).tolist():
                here = hidden.address + (row * count + int(last[row]) - start) * size
                self.gpu.copy_across(self.hidden.address + row * size, here, width=size)
        self.gpu.hold(feed, binding)

    def _bind_step(self) -> None:
        """Bind what steps read and write."""
        engine = self.runtime.engine("backbone")
        axes = {"rows": len(self.slots.lengths), "tokens": 1, "capacity": self.slots.capacity}
        told = [one for one in engine.contract.inputs if one.name in TOLD]
        self.told = Feed(self.gpu, told, axes, ahead=self.runtime.config.sync_every)
        self.stepping = self._bind("decode", axes, self.told, x=self.x, hidden=self.hidden)

    def _bind(self, profile: str, axes: Mapping[str, int], feed: Feed, **more: DeviceTensor) -> Binding:
        """Bind the backbone: every cache is what it reads and what it writes."""
        engine = self.runtime.engine("backbone")
        caches: dict[str, Any] = dict(self.slots.buffers)
        caches |= {new: caches[old] for new, old in engine.contract.aliases.items()}
        return engine.bind(profile, axes, {**feed.tensors, **caches, **more})

    def _slots(self, rows: int) -> Slots:
        gpu, capacity = self.gpu, self.runtime.engines.capacity
        return Slots(
            self.runtime.engine("backbone").contract,
            lambda shape, dtype: DeviceTensor.zeros(gpu, shape, dtype),
            rows=rows,
            limit=self.capacity,
            room=lambda end: capacity,  # it is part of the engine
        )

    def _between(self, name: str, rows: int) -> DeviceTensor:
        if (name, rows) not in self.between:
            shape = (rows, self.runtime.hidden_size)
            self.between[name, rows] = DeviceTensor.zeros(self.gpu, shape, self.runtime.dtype)
        return self.between[name, rows]


def chunks(total: int, low: int, high: int) -> list[tuple[int, int]]:
    """Cut ``total`` positions into (start, count), all of one count from ``low`` to ``high``, few and even.

    The last begins earlier where there is a rest: to write a position again with the same changes nothing.
    A total below ``low`` becomes one chunk that is longer than it.
    """
    pieces = -(-total // high)
    count = max(-(-total // pieces), low)
    return [(max(min(start, total - count), 0), count) for start in range(0, pieces * count, count)]
