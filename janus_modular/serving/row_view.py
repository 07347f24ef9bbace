"""A session of one request's rows, whose calls wait until the engine combines them with those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import SharedSession
from janus_modular.sequence import Sequence as Prompt
from janus_modular.sessions import BaseSession

Indices = NDArray[np.int64]


MOST_FED = 64
"""Positions of a row that a sampler feeds at once; more are fed in parts."""


class SharedTensor:
    """A tensor of the session that calls of several requests returned together."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class Vectors:
    """Some vectors (..., D) of a shared tensor: what a sampler gets in place of a tensor of its own."""

    __slots__ = ("hidden_size", "indices", "source")

    def __init__(self, source: SharedTensor, indices: Indices, hidden_size: int) -> None:
        self.source, self.indices, self.hidden_size = source, indices, hidden_size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this stands for."""
        return (*self.indices.shape, self.hidden_size)


def sources_and_rows(tensors: Sequence[Any]) -> tuple[list[Any], Indices]:
    """Return the distinct tensors behind some tensors, of which some may be `Vectors`, and their vectors.

    The vectors count through all tensors that are returned, as in `janus_modular.Session.take`.
    """
    sources, rows, offsets, end = list[Any](), list[Indices](), dict[int, int](), 0
    for tensor in tensors:
        is_part = isinstance(tensor, Vectors)
        source = tensor.source.tensor if is_part else tensor
        if id(source) not in offsets:
            sources.append(source)
            offsets[id(source)] = end
            end += prod(source.shape[:-1])
        indices = tensor.indices.reshape(-1) if is_part else np.arange(prod(source.shape[:-1]))
        rows.append(indices + offsets[id(source)])
    return sources, rows[0] if len(rows) == 1 else np.concatenate(rows)


def own_tensor(session: SharedSession, x: Any) -> Any:
    """Return vectors of a shared tensor as a tensor (..., D) of the session; anything else as it is."""
    if not isinstance(x, Vectors):
        return x
    sources, rows = sources_and_rows([x])
    return session.take(sources, rows.reshape(x.indices.shape))


def gather(session: SharedSession, tensors: Sequence[Any], order: Indices | None = None) -> Any:
    """Return all vectors of several tensors, in this order, as one tensor (n, D) of the session.

    It is a copy, unless it has all vectors of a tensor as they are.
    """
    sources, rows = sources_and_rows(tensors)
    rows = rows if order is None else rows[order]
    if len(sources) == 1 and not isinstance(sources[0], np.ndarray):
        shape = tuple(sources[0].shape)
        if len(shape) == 2 and len(rows) == shape[0] and (rows == np.arange(len(rows))).all():
            return sources[0]
    return session.take(sources, rows)


@dataclass(frozen=True)
class ReadCall:
    """Prompts to be read into the view's rows from ``first_row`` on; the result is the last states (n, D)."""

    prompts: Sequence[Prompt]
    first_row: int


@dataclass(frozen=True)
class FeedCall:
    """Embeddings x (rows, W, D) for all rows of the view; the result is the states (rows, W, D)."""

    x: Any
    counts: Indices


@dataclass(frozen=True)
class RunCall:
    """A graph to be run; the result is what it returns."""

    name: str
    inputs: tuple[Any, ...]


Call = ReadCall | FeedCall | RunCall


class RowView(BaseSession):
    """A `janus_modular.Session` over some rows of an engine's session, for one run of a sampler.

    Calls are checked here, with the limits that the run would have alone. Those that compute are passed to
    ``wait_for``, which returns their result once the engine has run them together with other requests' calls.
    """

    def __init__(
        self,
        session: SharedSession,
        max_seq_len: int,
        wait_for: Callable[[Call], Any],
        cut_back: Callable[[RowView], None],
        go_on_alone: Callable[[], bool],
    ) -> None:
        """Open a view without rows: the first prompts determine how many it needs.

        ``go_on_alone`` returns True while no other request wants to take part, before each step of a view
        that `is_alone`.
        """
        super().__init__(max_seq_len)
        self.session, self.wait_for, self.cut_back = session, wait_for, cut_back
        self.go_on_alone = go_on_alone
        self.is_alone = False  # the view has the first rows, and no other has any: calls are not joined
        self.hidden_size = session.hidden_size
        self.vocab_size, self.pad_id = session.vocab_size, session.pad_id
        self.image_positions, self.sizes = session.image_positions, session.sizes
        self.has_states = session.has_states
        self.signatures = session.signatures
        self.on_run: Callable[[str, Any], None] = lambda name, outputs: None  # sees what graphs return
        self.count = 0  # rows that the run needs
        self.rows: list[int] = []  # of the engine's session, in the view's order; [] while it waits for rows

    def allocate_rows(self, count: int) -> None:
        """Ask for ``count`` rows in place of those that the view has."""
        self.count = count

    def read_prompts(self, prompts: Sequence[Prompt], first_row: int) -> Any:
        """Wait until prompts are read; return the last hidden states (n, D)."""
        return self.wait_for(ReadCall(prompts, first_row))

    def feed(self, x: Any, counts: Indices) -> Any:
        """Wait until x (rows, W, D) is fed; return the hidden states (rows, W, D).

        Many positions are fed in parts, so that they hold up other requests no longer than prompts do.
        """
        num_positions: int = x.shape[1]
        size = min(self.session.max_feed or MOST_FED, MOST_FED)
        if num_positions <= size:
            return self._feed(x, counts)
        vectors = np.arange(x.shape[0] * num_positions).reshape(-1, num_positions)
        parts, indices, end = list[Any](), list[Indices](), 0
        for start in range(0, num_positions, size):
            columns = vectors[:, start : start + size]
            hidden = self._feed(self.take(x, columns), np.clip(counts - start, 0, columns.shape[1]))
            indices.append(end + np.arange(columns.size).reshape(columns.shape))
            parts.append(self.take(hidden, indices[-1] - end))  # the next part may overwrite it
            end += columns.size
        return self.take(parts, np.concatenate(indices, axis=1))

    def _feed(self, x: Any, counts: Indices) -> Any:
        if self.is_alone:
            if self.go_on_alone():
                return self.session.extend_rows(own_tensor(self.session, x), counts, 0)
            self.is_alone = False
            x = self.session.take(*sources_and_rows([x]))  # another request's graphs may overwrite it
            x = self.session.take(x, np.arange(x.shape[0]).reshape(len(counts), -1))
        return self.wait_for(FeedCall(x, counts))

    def run(self, name: str, *inputs: Any) -> Any:
        """Wait until a graph is run; return its outputs."""
        base, name = name, self.graph_names.get(name, name)
        if self.is_alone:
            outputs = self.session.run(name, *(own_tensor(self.session, x) for x in inputs))
        else:
            outputs = self.wait_for(RunCall(name, inputs))
        self.on_run(base, outputs)
        return outputs

    def cut_rows(self) -> None:
        """Cut the rows of the engine's session back to `lengths`."""
        self.cut_back(self)

    def expand(self, x: Any) -> Any:
        """Return (n, D) as (n, 1, D)."""
        if isinstance(x, Vectors):
            return Vectors(x.source, x.indices[:, None], x.hidden_size)
        return self.session.expand(x)

    def squeeze(self, x: Any) -> Any:
        """Return (n, 1, D) as (n, D)."""
        if isinstance(x, Vectors):
            return Vectors(x.source, x.indices[:, 0], x.hidden_size)
        return self.session.squeeze(x)

    def take(self, tensors: Any, indices: Any) -> Any:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D)."""
        several = tensors if isinstance(tensors, list | tuple) else [tensors]
        sources, rows = sources_and_rows(several)
        return self.session.take(sources, rows[np.asarray(indices, np.int64)])

    def stack(self, columns: Sequence[Any]) -> Any:
        """Join the ids that `run` sampled in successive steps (rows, ...) as (rows, steps, ...)."""
        if any(isinstance(column, np.ndarray) for column in columns):  # they were divided, on the host
            return np.stack([self.to_host(column) for column in columns], axis=1)
        return self.session.stack(columns)

    def to_host(self, x: Any) -> NDArray[Any]:
        """Copy a tensor to numpy."""
        if isinstance(x, np.ndarray):
            return x.copy()
        return self.session.to_host(own_tensor(self.session, x))
