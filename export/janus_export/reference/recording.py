"""Sessions that record what goes through them: prompts, positions and states of rows, and calls of graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import Sequence as Prompt
from janus_modular import SessionWrapper
from janus_modular.protocols import Runtime, Session

Array = NDArray[Any]


@dataclass
class GraphCall:
    """A call of a graph: its inputs, its outputs, and how many calls of the backbone came before it."""

    graph: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    step: int


@dataclass
class BackboneCall:
    """A call that reads positions into rows of a session, or removes them."""

    method: str  # of the session: prefill, admit, step, extend, truncate or free
    arguments: tuple[Any, ...]  # tensors are copied to numpy
    before: Array  # (rows,) the lengths of rows before the call
    after: Array  # (rows,) and after it
    hidden: Array | None = None  # (n, D) or (rows, W, D); None: the method returns no states

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts that were read; none for a call that feeds embeddings."""
        return self.arguments[0] if self.method in ("prefill", "admit") else ()

    @property
    def valid(self) -> Array:
        """Which of the states are defined: (n,) or (rows, W)."""
        if self.hidden is None or self.prompts:
            return np.ones(len(self.prompts), np.bool_)
        kept = self.after - self.before
        return kept > 0 if self.hidden.ndim == 2 else np.arange(self.hidden.shape[1]) < kept[:, None]

    def states(self, hidden: Array | None = None) -> Array:
        """Return the defined states (M, D) of this call, or of ``hidden``, the result of the same call."""
        recorded = self.hidden if hidden is None else hidden
        return np.zeros((0, 0)) if recorded is None else recorded[self.valid]


@dataclass
class Run:
    """Everything that went through a session."""

    max_seq_len: int
    rows: int | None = None
    backbone: list[BackboneCall] = field(default_factory=list)
    calls: list[GraphCall] = field(default_factory=list)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts that were read first."""
        return next((call.prompts for call in self.backbone if call.prompts), ())

    @property
    def reads(self) -> list[BackboneCall]:
        """The calls that return states."""
        return [call for call in self.backbone if call.hidden is not None]

    def calls_of(self, *graphs: str) -> list[GraphCall]:
        """Return the calls of these graphs, in their order."""
        return [call for call in self.calls if call.graph in graphs]

    def read_before(self, call: GraphCall) -> BackboneCall | None:
        """Return the last call of the backbone that returned states before a call of a graph."""
        reads = [read for read in self.backbone[: call.step] if read.hidden is not None]
        return reads[-1] if reads else None

    def replay(self, runtime: Runtime) -> list[Array]:
        """Make the same calls in another runtime; return the defined states (M, D) of each of `reads`."""
        session, states = runtime.open(self.max_seq_len, self.rows), []
        for call in self.backbone:
            result = getattr(session, call.method)(*call.arguments)
            if call.hidden is not None:
                states.append(call.states(session.to_host(result).astype(np.float32)))
        return states

    def row(self, row: int) -> Run:
        """Return what was read into one row, as a run of a session that has no other."""
        run = Run(self.max_seq_len)
        arguments: tuple[Any, ...]
        for call in self.backbone:
            rows = list(call.arguments[1]) if call.method == "admit" else list(range(len(call.after)))
            if call.prompts and row in rows:
                number = rows.index(row)
                method, arguments = "prefill", ([call.prompts[number]],)
                hidden = None if call.hidden is None else call.hidden[number : number + 1]
            elif call.hidden is not None and not call.prompts and call.after[row] > call.before[row]:
                count = int(call.after[row] - call.before[row])
                x, hidden = call.arguments[0][row : row + 1], call.hidden[row : row + 1]
                if call.method == "extend":
                    x, hidden = x[:, :count], hidden[:, :count]
                method, arguments = call.method, (x,)
            elif row < len(call.before) and call.after[row] < call.before[row]:
                method, arguments, hidden = "truncate", (call.after[row : row + 1],), None
            else:
                continue
            before = np.zeros(1, np.int64) if call.prompts else call.before[row : row + 1]
            run.backbone.append(BackboneCall(method, arguments, before, call.after[row : row + 1], hidden))
        return run


class RecordingSession(SessionWrapper):
    """A session that records what goes through it."""

    def __init__(self, session: Session, run: Run) -> None:
        super().__init__(session)
        self.run_ = run

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Record the prompts and the states after them."""
        return self._recorded("prefill", list(prompts))

    def admit(self, prompts: Sequence[Prompt], rows: Iterable[int]) -> Any:
        """Record the prompts, their rows and the states after them."""
        return self._recorded("admit", list(prompts), list(rows))

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Record a step and the states after it."""
        return self._recorded("step", x, active)

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Record the positions that are fed and their states."""
        return self._recorded("extend", x, counts)

    def truncate(self, lengths: Any) -> None:
        """Record the lengths that rows are cut back to."""
        self._recorded("truncate", lengths)

    def free(self, rows: Iterable[int]) -> None:
        """Record the rows that are emptied."""
        self._recorded("free", list(rows))

    def run(self, name: str, *inputs: Any) -> Any:
        """Record a call of a graph."""
        copies = tuple(
            np.array(x) if isinstance(x, int | float | np.generic | np.ndarray) else self._copied(x)
            for x in inputs
        )
        result = self.session.run(name, *inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        step = len(self.run_.backbone)
        self.run_.calls.append(GraphCall(name, copies, tuple(map(self._copied, outputs)), step))
        return result

    def _recorded(self, method: str, *arguments: Any) -> Any:
        is_fed, before = method in ("step", "extend"), self.session.lengths
        first = self._copied(arguments[0]) if is_fed else arguments[0]  # before its memory is used again
        result = getattr(self.session, method)(*arguments)
        after = self.session.lengths
        if len(before) != len(after):  # the session had no rows
            before = np.zeros(len(after), np.int64)
        hidden = None if result is None else self._copied(result)
        copies = (first, *(np.array(x) if isinstance(x, np.ndarray) else x for x in arguments[1:]))
        self.run_.backbone.append(BackboneCall(method, copies, before, after, hidden))
        return result

    def _copied(self, x: Any) -> Array:
        return self.session.to_host(x).copy()


class RecordingRuntime:
    """A runtime whose sessions are recorded."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.runs = runtime, list[Run]()
        self.context, self.text_sampler = runtime.context, runtime.text_sampler
        self.image_sampler = runtime.image_sampler

    def open(self, max_seq_len: int, rows: int | None = None) -> RecordingSession:
        """Open a session, and record what it does."""
        self.runs.append(Run(max_seq_len, rows))
        return RecordingSession(self.runtime.open(max_seq_len, rows), self.runs[-1])
