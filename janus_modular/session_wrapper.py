"""A session that forwards every call to another: derive from it to observe calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import Session
from janus_modular.sequence import Sequence as Prompt


class SessionWrapper:
    """A `janus_modular.Session` that forwards every call to another one; derive from it to observe some."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.hidden_size = session.hidden_size
        self.vocab_size, self.pad_id = session.vocab_size, session.pad_id
        self.image_positions, self.sizes = session.image_positions, session.sizes
        self.max_seq_len, self.has_states = session.max_seq_len, session.has_states

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The positions that each row holds (rows,)."""
        return self.session.lengths

    def admit(self, prompts: Sequence[Prompt], rows: Iterable[int]) -> Any:
        """Forward the call."""
        return self.session.admit(prompts, rows)

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Forward the call."""
        return self.session.extend(x, counts)

    def truncate(self, lengths: Any) -> None:
        """Forward the call."""
        self.session.truncate(lengths)

    def free(self, rows: Iterable[int]) -> None:
        """Forward the call."""
        self.session.free(rows)

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Forward the call."""
        return self.session.prefill(prompts)

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Forward the call."""
        return self.session.step(x, active)

    def run(self, name: str, *inputs: Any) -> Any:
        """Forward the call."""
        return self.session.run(name, *inputs)

    def take(self, tensors: Any, indices: Any) -> Any:
        """Forward the call."""
        return self.session.take(tensors, indices)

    def stack(self, columns: Sequence[Any]) -> Any:
        """Forward the call."""
        return self.session.stack(columns)

    def to_host(self, x: Any) -> NDArray[Any]:
        """Forward the call."""
        return self.session.to_host(x)
