"""Sessions that are overheard: what a model or a bundle was asked, and what it said, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import Sequence as Prompt
from janus_modular import SessionWrapper
from janus_modular.protocols import Runtime, Session

Array = NDArray[Any]


@dataclass
class Run:
    """What a session was asked and what it said."""

    prompts: list[Prompt] = field(default_factory=list)
    fed: list[tuple[Array, Array | None]] = field(default_factory=list)  # x (R, D), and who was active
    hidden: list[Array] = field(default_factory=list)  # (R, D), after the prompts and after each step
    parts: list[tuple[str, tuple[Any, ...], tuple[Array, ...]]] = field(default_factory=list)
    chosen: list[Array] = field(default_factory=list)  # ids or codes (rows,), codes (rows, S)

    def active(self, step: int) -> Array:
        """Say which rows count after step ``step``; 0 are the prompts."""
        rows = np.ones(len(self.prompts), np.bool_)
        given = self.fed[step - 1][1] if step else None
        return rows if given is None else given


class Listening(SessionWrapper):
    """A session that takes down what goes through it."""

    def __init__(self, session: Session, run: Run) -> None:
        super().__init__(session)
        self.run_ = run

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Pass on."""
        self.run_.prompts = list(prompts)
        return self._heard(self.session.prefill(prompts))

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Pass on."""
        self.run_.fed.append((self.session.to_host(x).copy(), None if active is None else active.copy()))
        return self._heard(self.session.step(x, active))

    def run(self, name: str, *inputs: Any) -> Any:
        """Pass on."""
        given = tuple(
            np.asarray(x) if isinstance(x, int | float | np.generic | np.ndarray) else self.session.to_host(x)
            for x in inputs
        )
        made = self.session.run(name, *inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        self.run_.parts.append((name, tuple(map(np.copy, given)), tuple(map(self._copied, outputs))))
        if name in ("sample_text", "sample_image"):
            self.run_.chosen.append(self._copied(outputs[0]))
        return made

    def _heard(self, hidden: Any) -> Any:
        self.run_.hidden.append(self._copied(hidden))
        return hidden

    def _copied(self, x: Any) -> Array:
        return self.session.to_host(x).copy()


class ListeningRuntime:
    """A runtime whose sessions are listened to."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.runs = runtime, list[Run]()
        self.context, self.text_sampler = runtime.context, runtime.text_sampler
        self.image_sampler = runtime.image_sampler

    def open(self, max_seq_len: int, rows: int | None = None) -> Listening:
        """Open a session, and take down what it does."""
        self.runs.append(Run())
        return Listening(self.runtime.open(max_seq_len, rows), self.runs[-1])
