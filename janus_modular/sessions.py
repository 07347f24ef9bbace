"""The common base of all sessions: lengths of rows, and checks of each call.

Imports no torch, because the sessions of ONNX Runtime and TensorRT derive from it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import PromptError
from janus_modular.graph_specs import GraphSignature, graph_of_role
from janus_modular.image_sizes import ImageSize
from janus_modular.positions import RowPositions, check_position_ids, check_together
from janus_modular.sequence import Sequence as Prompt
from janus_modular.session_errors import encoded_images_refused, is_integer, refuse_cut_states

Integers = NDArray[np.int64]


class BaseSession(ABC):
    """The base class of sessions: implements `janus_modular.Session` except for the computation.

    A subclass implements the abstract methods. This class checks every call first, so `allocate_rows`,
    `read_prompts` and `feed` get valid arguments only. ``lengths`` changes after they have returned, so a
    call that raises an error changes no length.
    """

    vocab_size: int  # V
    pad_id: int  # token id of padding
    image_positions: int  # positions of a generated image
    sizes: Mapping[str, Any]  # of the generation path
    hidden_size: int  # D
    has_states: bool = False  # has recurrent layers: rows can only be emptied, not shortened
    position_axes: int = 0  # P, the axes of position ids (M-RoPE)
    together: bool = False  # prompts have blocks of positions that attend to each other
    max_feed: int | None = None  # maximum W of `feed`; None: no limit
    signatures: Mapping[str, GraphSignature] = {}  # of graphs whose calls can be joined

    def __init__(self, max_seq_len: int, rows: int | None = None) -> None:
        """Open a session of ``rows`` rows (None: one per first prompt) of ``max_seq_len`` positions."""
        for name, value in (("max_seq_len", max_seq_len), ("rows", rows)):
            if value is not None and (not is_integer(value) or value < 1):
                raise PromptError(f"{name}: found {value!r:.80}; expected a whole number of 1 or more.")
        self.max_seq_len = max_seq_len
        self._fixed_rows = rows
        self._is_allocated = False
        self._lengths = _frozen(np.zeros(rows or 0, np.int64))
        self.row_positions = RowPositions(0, 0)
        self.graph_names: Mapping[str, str] = {}  # of graphs for the size that is drawn, if not the model's

    def draw_at(self, size: ImageSize) -> None:
        """Draw images of another size than the model's: `run` runs its graphs from now on."""
        self.image_positions, self.sizes, self.graph_names = size.positions, size.sizes, size.graphs

    @property
    def lengths(self) -> Integers:
        """The number of positions of each row (rows,); 0: the row is free. The array is read-only."""
        return self._lengths

    @abstractmethod
    def allocate_rows(self, count: int) -> None:
        """Allocate ``count`` empty rows, which replace all present rows.

        Raises:
            PromptError: the runtime does not support so many rows.
        """

    @abstractmethod
    def read_prompts(self, prompts: Sequence[Prompt], first_row: int) -> Any:
        """Read n prompts into the free rows from ``first_row`` on; return the last hidden states (n, D)."""

    @abstractmethod
    def feed(self, x: Any, counts: Integers) -> Any:
        """Append the embeddings x (rows, W, D) to the rows; return the hidden states (rows, W, D).

        Each row keeps its first ``counts`` (rows,) positions; the others are padding. Padding of a full row
        must neither overwrite kept positions nor be written outside of the cache.
        """

    @abstractmethod
    def expand(self, x: Any) -> Any:
        """Return (n, D) as (n, 1, D), in the same memory."""

    @abstractmethod
    def squeeze(self, x: Any) -> Any:
        """Return (n, 1, D) as (n, D), in the same memory."""

    @abstractmethod
    def take(self, tensors: Any, indices: Any) -> Any:
        """See `janus_modular.Session.take`."""

    def cut_rows(self) -> None:  # noqa: B027 - a runtime that only reads `lengths` has nothing to do
        """Shorten the rows of the cache to `lengths`; called after `truncate` has reduced these."""

    def admit(self, prompts: Sequence[Prompt], rows: Iterable[int]) -> Any:
        """Read one prompt into each of the free rows; return the prompts' last hidden states (len(rows), D).

        Raises:
            PromptError: a row is not free or does not exist; a prompt is empty or too long.
        """
        indices = self._row_indices(rows)
        lengths = self._prompt_lengths(prompts)
        if len(lengths) != len(indices):
            raise PromptError(
                f"admit: found {len(lengths)} prompts for {len(indices)} rows; expected one for each row."
            )
        if full := [row for row in indices.tolist() if row < len(self._lengths) and self._lengths[row]]:
            raise PromptError(
                f"admit: found {self._lengths[full[0]]} positions in row {full[0]}; expected a free row:"
                f" free([{full[0]}]) first, or choose another."
            )
        if not self._is_allocated:
            self._allocate(self._fixed_rows or int(indices.max()) + 1)
        order = np.argsort(indices)
        runs = np.split(order, np.flatnonzero(np.diff(indices[order]) != 1) + 1)  # of consecutive rows
        states = []
        for run in runs:
            hidden = self.read_prompts([prompts[i] for i in run], int(indices[run[0]]))
            states.append(hidden if len(runs) == 1 else self.take(hidden, np.arange(len(run))))
        after = self._lengths.copy()
        after[indices] = lengths
        for row, prompt in zip(indices.tolist(), prompts, strict=True):
            self.row_positions.admit(row, prompt)
        self._lengths = _frozen(after)
        in_order = bool((order == np.arange(len(order))).all())
        return states[0] if len(runs) == 1 and in_order else self.take(states, np.argsort(order))

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Append up to W positions with embeddings x (rows, W, D) to each row; return all hidden states.

        ``counts`` (rows,): positions that each row keeps; None: all W. Hidden states are (rows, W, D).

        Raises:
            PromptError: the shape is wrong, a row with a count above 0 is free or would be longer than
                ``max_seq_len``, or W is above `max_feed`.
        """
        shape, rows = tuple(x.shape), len(self._lengths)
        if len(shape) != 3 or shape[::2] != (rows, self.hidden_size) or not shape[1]:
            raise PromptError(
                f"extend: found x of shape {shape}; expected (rows, positions, hidden size), which is"
                f" ({rows}, 1 or more, {self.hidden_size})."
            )
        if self.max_feed is not None and shape[1] > self.max_feed:
            raise PromptError(
                f"extend: found {shape[1]} positions a row; expected {self.max_feed} at most, for which this"
                " runtime was built. Feed fewer at once."
            )
        checked = self._checked_counts("extend", counts, shape[1])
        hidden = self.feed(x, checked)
        self._lengths = _frozen(self._lengths + checked)
        return hidden

    def extend_rows(self, x: Any, counts: Any, first_row: int) -> Any:
        """Append x (n, W, D) to the n rows from ``first_row`` on; return their hidden states (n, W, D).

        Like `extend`, but rows may also be free: an engine prefills a prompt in chunks of its embeddings
        (`embed_prompts`). Unless the runtime implements `feed_rows`, all other rows compute padding.

        Raises:
            PromptError: the shape is wrong, a row does not exist or would be longer than ``max_seq_len``, or
                W is above `max_feed`.
        """
        if not self._is_allocated and self._fixed_rows:
            self._allocate(self._fixed_rows)
        shape, total, limit = tuple(x.shape), len(self._lengths), self.max_feed
        if len(shape) != 3 or shape[2] != self.hidden_size or not 1 <= shape[1] <= (limit or shape[1]):
            at_most = "" if limit is None else f" to {limit}"
            raise PromptError(
                f"extend_rows: found x of shape {shape}; expected (rows, 1 or more{at_most} positions,"
                f" {self.hidden_size})."
            )
        if not 0 <= first_row < first_row + shape[0] <= total:
            raise PromptError(
                f"extend_rows: found {shape[0]} rows from row {first_row} on; expected some of {total} rows."
            )
        before = self._lengths[first_row : first_row + shape[0]]
        checked = np.asarray(counts, np.int64)
        if checked.shape != before.shape or checked.min() < 0 or checked.max() > shape[1]:
            raise PromptError(
                f"extend_rows: found counts {counts}; expected 0 to {shape[1]}, the positions in x, a row."
            )
        self._check_end(int((before + checked).max()))
        hidden = self.feed(x, checked) if shape[0] == total else self.feed_rows(x, checked, first_row)
        after = self._lengths.copy()
        after[first_row : first_row + shape[0]] += checked
        self._lengths = _frozen(after)
        return hidden

    def feed_rows(self, x: Any, counts: Integers, first_row: int) -> Any:
        """Append x (n, W, D) to the n rows from ``first_row`` on; return their hidden states (n, W, D).

        This default computes padding in all other rows. A runtime that can run a part of its rows overrides
        the method.
        """
        count, width = x.shape[:2]
        padded = np.zeros((len(self._lengths), width), np.int64)
        padded[first_row : first_row + count] = np.arange(count * width).reshape(count, width)
        counts_of_all = np.zeros_like(self._lengths)
        counts_of_all[first_row : first_row + count] = counts
        return self.take(
            self.feed(self.take(x, padded), counts_of_all),
            first_row * width + padded[first_row : first_row + count],
        )

    def embed_prompts(self, prompts: Sequence[Prompt]) -> Any | None:
        """Return a copy of the embeddings (n, T, D) of prompts for `extend_rows`; shorter ones are padded.

        Return None if the prompts must be read by `admit`: they have position ids, blocks or hidden
        positions, or the runtime does not implement `prompt_embeddings`.
        """
        if self.position_axes or self.together or any(prompt.hidden is not None for prompt in prompts):
            return None
        return self.prompt_embeddings(prompts)

    def prompt_embeddings(self, prompts: Sequence[Prompt]) -> Any | None:
        """Return the embeddings (n, T, D) of prompts, padded; None: not supported by this runtime."""
        return None

    def copy_row(self, source: int, target: int, length: int) -> bool:
        """Copy the first ``length`` positions of row ``source`` to row ``target``, for a prefix cache.

        Return False if the runtime cannot copy rows; nothing has changed then.
        """
        if not self.copy_positions(source, target, length):
            return False
        self.row_positions.copy_row(source, target, length)
        lengths = self._lengths.copy()
        lengths[target] = length
        self._lengths = _frozen(lengths)
        self.cut_rows()
        return True

    def copy_positions(self, source: int, target: int, length: int) -> bool:
        """Copy the cache of a row's first ``length`` positions to another row; False: not supported."""
        return False

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Empty all rows, then read prompt i into row i; return the last hidden states (len(prompts), D).

        Raises:
            PromptError: a prompt is empty or too long, or there are more than the session has rows.
        """
        lengths = self._prompt_lengths(prompts)
        if self._fixed_rows is not None and len(lengths) > self._fixed_rows:
            raise PromptError(
                f"prefill: found {len(lengths)} prompts; expected {self._fixed_rows} at most, the rows of the"
                " session. For more, open it with rows=N."
            )
        if self._fixed_rows is None:
            self._lengths, self._is_allocated = _frozen(np.zeros(0, np.int64)), False
        elif self._is_allocated:
            self.free(range(len(self._lengths)))
        return self.admit(prompts, range(len(prompts)))

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Append one position with embeddings x (rows, D) to each row; return its hidden states (rows, D).

        Raises:
            PromptError: the shape is wrong, or an active row is free or full.
        """
        expected = len(self._lengths), self.hidden_size
        if tuple(x.shape) != expected:
            raise PromptError(
                f"step: found x of shape {tuple(x.shape)}; expected {expected}, one embedding a row."
            )
        checked = self._checked_counts("step", active, 1)
        hidden = self.squeeze(self.feed(self.expand(x), checked))
        self._lengths = _frozen(self._lengths + checked)
        return hidden

    def truncate(self, lengths: Any) -> None:
        """Shorten each row to its length in ``lengths`` (rows,); 0 frees the row.

        Raises:
            PromptError: a length is negative or above the row's present length; or the session `has_states`,
                and a length is neither 0 nor the present one.
        """
        shorter = self._integers("truncate", "lengths", lengths)
        if wrong := np.flatnonzero((shorter < 0) | (shorter > self._lengths)).tolist():
            row = wrong[0]
            raise PromptError(
                f"truncate: found length {shorter[row]} for row {row}; expected 0 to {self._lengths[row]},"
                " the positions that it holds."
            )
        if self.has_states:
            refuse_cut_states(shorter, self._lengths)
        if self._is_allocated:
            self.row_positions.truncate(shorter)
        self._lengths = _frozen(shorter)
        if self._is_allocated:
            self.cut_rows()

    def free(self, rows: Iterable[int]) -> None:
        """Empty rows, so that other prompts can be admitted into them.

        Raises:
            PromptError: there is no row of this number.
        """
        lengths = self._lengths.copy()
        lengths[self._row_indices(rows)] = 0
        self.truncate(lengths)

    def _allocate(self, rows: int) -> None:
        self.allocate_rows(rows)
        self.row_positions = RowPositions(self.position_axes, rows)
        self._lengths, self._is_allocated = _frozen(np.zeros(rows, np.int64)), True

    def _row_indices(self, rows: Iterable[int]) -> Integers:
        is_list = isinstance(rows, Iterable) and not isinstance(rows, str | bytes)
        numbers = [*rows] if is_list else []
        if not is_list or not all(map(is_integer, numbers)):
            raise PromptError(f"rows: found {rows!r:.80}; expected a list of whole numbers.")
        indices = np.array(numbers, np.int64)
        limit = len(self._lengths) if self._is_allocated or self._fixed_rows else None
        if not len(indices):
            raise PromptError("rows: found none; expected the number of at least one row.")
        if len(np.unique(indices)) < len(indices):
            raise PromptError(f"rows: found {indices.tolist()}; expected each row once.")
        if indices.min() < 0 or (limit is not None and indices.max() >= limit):
            expected = "numbers from 0" if limit is None else f"0 to {limit - 1}: the session has {limit}"
            raise PromptError(
                f"rows: found {indices.tolist()}; expected {expected}. For more, open it with rows=N."
            )
        return indices

    def _prompt_lengths(self, prompts: Sequence[Prompt]) -> Integers:
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if not len(lengths) or not lengths.min():
            actual = "an empty prompt" if len(lengths) else "no prompts"
            raise PromptError(f"prompts: found {actual}; expected at least one position in each.")
        self._check_end(int(lengths.max()))
        check_position_ids(prompts, self.position_axes)
        check_together(prompts, self.together)
        if any(prompt.generation_images for prompt in prompts) and not graph_of_role(
            self.signatures, "embed"
        ):
            raise encoded_images_refused()
        for prompt in prompts:
            tokens = np.asarray(prompt.tokens)[~(prompt.understanding_mask | prompt.generation_mask)]
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
                unknown = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
                raise PromptError(
                    f"prompts: found the token id {unknown[0]}; expected 0 to {self.vocab_size - 1}, the"
                    " model's vocabulary."
                )
        return lengths

    def _checked_counts(self, method: str, counts: Any, positions: int) -> Integers:
        """Return how many positions each row is to keep, if they fit."""
        if not len(self._lengths):
            raise PromptError(f"{method}: found no rows; expected prompts in them: admit some first.")
        if counts is None:
            checked = np.full(len(self._lengths), positions, np.int64)
        else:
            checked = self._integers(method, "counts", counts)
            if checked.min() < 0 or checked.max() > positions:
                raise PromptError(
                    f"{method}: found counts {checked.tolist()}; expected 0 to {positions}, the positions in"
                    " x."
                )
        if len(empty := np.flatnonzero((self._lengths == 0) & (checked > 0))):
            row = int(empty[0])
            raise PromptError(
                f"{method}: found {checked[row]} positions for row {row}, which is free; expected 0: admit a"
                " prompt first."
            )
        self._check_end(int((self._lengths + checked).max()))
        return checked

    def _check_end(self, end: int) -> None:
        if end > self.max_seq_len:
            raise PromptError(
                f"{end} positions do not fit into a session of {self.max_seq_len}: shorten the prompt, ask"
                " for fewer tokens, or open the session with a larger max_seq_len"
            )

    def _integers(self, method: str, name: str, values: Any) -> Integers:
        array = np.asarray(values)
        if array.shape != self._lengths.shape or array.dtype.kind not in "biu":
            raise PromptError(
                f"{method}: found {name} of shape {array.shape} and dtype {array.dtype}; expected whole"
                f" numbers ({len(self._lengths)},), one a row."
            )
        return array.astype(np.int64)


def _frozen(array: Integers) -> Integers:
    array.flags.writeable = False
    return array
