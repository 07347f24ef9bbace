"""Sessions that record what goes through them, step by step: prompts, states, and calls of graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.errors import ExportError
from janus_modular import Sequence as Prompt
from janus_modular import SessionWrapper
from janus_modular.protocols import Runtime, Session

Array = NDArray[Any]


@dataclass
class GraphCall:
    """A call of a graph: its inputs, its outputs, and how many steps of the backbone came before it."""

    graph: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    step: int


@dataclass
class Run:
    """Everything that went through a session."""

    prompts: list[Prompt] = field(default_factory=list)
    fed: list[tuple[Array, Array | None]] = field(default_factory=list)  # x (R, D), and the active rows (R,)
    hidden: list[Array] = field(default_factory=list)  # (R, D), after the prompts and after each step
    calls: list[GraphCall] = field(default_factory=list)

    def calls_of(self, *graphs: str) -> list[GraphCall]:
        """Return the calls of these graphs, in their order."""
        return [call for call in self.calls if call.graph in graphs]

    def active(self, step: int) -> Array:
        """Return which rows (R,) are active after step ``step``; step 0: the prompts."""
        active = self.fed[step - 1][1] if step else None
        return np.ones(len(self.prompts), np.bool_) if active is None else active


class RecordingSession(SessionWrapper):
    """A session that records what goes through it: prompts of all rows, and steps of one position.

    Other calls are errors: a run that cannot be replayed would silently be verified only in part.
    """

    def __init__(self, session: Session, run: Run) -> None:
        super().__init__(session)
        self.run_ = run

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Record the prompts and the states after them."""
        self.run_.prompts = list(prompts)
        return self._recorded(self.session.prefill(prompts))

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Record a step and the states after it."""
        self.run_.fed.append((self._copied(x), None if active is None else active.copy()))
        return self._recorded(self.session.step(x, active))

    def admit(self, prompts: Sequence[Prompt], rows: Iterable[int]) -> Any:
        """Raise ExportError: rows that come and go are not recorded."""
        raise self._unrecorded("admit")

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Raise ExportError: steps of several positions are not recorded."""
        raise self._unrecorded("extend")

    def truncate(self, lengths: Any) -> None:
        """Raise ExportError: rows that are cut are not recorded."""
        raise self._unrecorded("truncate")

    def free(self, rows: Iterable[int]) -> None:
        """Raise ExportError: rows that come and go are not recorded."""
        raise self._unrecorded("free")

    def run(self, name: str, *inputs: Any) -> Any:
        """Record a call of a graph."""
        copies = tuple(
            np.array(x) if isinstance(x, int | float | np.generic | np.ndarray) else self._copied(x)
            for x in inputs
        )
        result = self.session.run(name, *inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        self.run_.calls.append(GraphCall(name, copies, tuple(map(self._copied, outputs)), len(self.run_.fed)))
        return result

    @staticmethod
    def _unrecorded(method: str) -> ExportError:
        return ExportError(
            f"the sampler calls session.{method}(), which verify cannot replay; expected prefill(),"
            " step() and run() alone. Verify with a sampler that uses only these: save the model with another"
            " text_sampler or image_sampler."
        )

    def _recorded(self, hidden: Any) -> Any:
        self.run_.hidden.append(self._copied(hidden))
        return hidden

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
        self.runs.append(Run())
        return RecordingSession(self.runtime.open(max_seq_len, rows), self.runs[-1])
