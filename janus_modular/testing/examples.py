"""Examples for checks whose input is not a single tensor, and a session in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import Session
from janus_modular.sequence import IGNORE_INDEX, Sequence
from janus_modular.sessions import BaseSession
from janus_modular.testing.check import NotApplicable

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN_SIZE, VOCAB_SIZE, CODES, POSITIONS = 6, 11, 7, 4
"""Sizes of `NumpySession`: hidden size, number of tokens, number of codes, positions of an image."""


@dataclass
class SamplingExample:
    """The inputs of a sampler."""

    settings: Any  # an instance of the dataclass that is registered with it
    prompts: Many[Sequence]
    open: Callable[[], Session]


@dataclass
class CheckpointFormatExample:
    """A checkpoint of a format: its config.json, and its tensors by the format's names."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def prompt(*tokens: int) -> Sequence:
    """Return a prompt of these token ids, without images."""
    ids = np.array(tokens, np.int64)
    no_images = np.zeros(len(ids), np.bool_)
    return Sequence(ids, np.full_like(ids, IGNORE_INDEX), no_images, no_images.copy())


class ExampleSizes(dict[str, Any]):
    """The sizes of the example's session; reading another size skips the check."""

    def __missing__(self, name: str) -> Any:
        raise NotApplicable(f"the example's session has no size '{name}': pass a session that has")


class RecurrentSession(BaseSession):
    """A session over a recurrence in numpy: an input x makes tanh(h / 2 + x) of a row's hidden state h."""

    def __init__(self, table: NDArray[np.float32], max_seq_len: int = 4096, rows: int | None = None) -> None:
        """Take the embeddings (V, D) of tokens."""
        super().__init__(max_seq_len, rows)
        self.table, self.hidden_size = table, table.shape[1]
        self.states: list[list[NDArray[np.float32]]] = []  # of each row, after each of its positions

    def allocate_rows(self, count: int) -> None:
        """Make ``count`` empty rows."""
        self.states = [[] for _ in range(count)]

    def read_prompts(self, prompts: Many[Sequence], first_row: int) -> Any:
        """Read prompts into the rows from ``first_row`` on; return the last hidden states (n, D)."""
        for row, prompt in enumerate(prompts, first_row):
            self.states[row] = []
            self._feed_row(row, self.table[prompt.tokens])
        return np.stack([self.states[first_row + i][-1] for i in range(len(prompts))])

    def feed(self, x: Any, counts: NDArray[np.int64]) -> Any:
        """Feed x (rows, W, D); return the hidden states (rows, W, D)."""
        hidden = np.zeros(x.shape, np.float32)
        for row, count in enumerate(counts.tolist()):
            del self.states[row][self.lengths[row] :]
            self._feed_row(row, np.asarray(x[row, :count]))
            if count:
                hidden[row, :count] = self.states[row][-count:]
        return hidden

    def prompt_embeddings(self, prompts: Many[Sequence]) -> Any:
        """Return the embeddings (n, T, D) of prompts, padded with zeros."""
        x = np.zeros((len(prompts), max(map(len, prompts)), self.hidden_size), np.float32)
        for row, prompt in enumerate(prompts):
            x[row, : len(prompt)] = self.table[prompt.tokens]
        return x

    def copy_positions(self, source: int, target: int, length: int) -> bool:
        """Copy the states after a row's first positions."""
        self.states[target] = self.states[source][:length]
        return True

    def _feed_row(self, row: int, x: NDArray[np.float32]) -> None:
        for embedding in x:
            before = self.states[row][-1] if self.states[row] else np.zeros(self.hidden_size, np.float32)
            self.states[row].append(np.tanh(0.5 * before + embedding))

    def expand(self, x: Any) -> Any:
        """Return (n, D) as (n, 1, D)."""
        return x[:, None]

    def squeeze(self, x: Any) -> Any:
        """Return (n, 1, D) as (n, D)."""
        return x[:, 0]

    def take(self, tensors: Any, indices: Any) -> Any:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D)."""
        several = tensors if isinstance(tensors, list | tuple) else [tensors]
        return np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in several])[np.asarray(indices)]


class NumpySession(RecurrentSession):
    """A `janus_modular.Session` in numpy: deterministic, with independent rows."""

    def __init__(self, max_seq_len: int = 4096, rows: int | None = None) -> None:
        self.vocab_size, self.pad_id, self.image_positions = VOCAB_SIZE, 0, POSITIONS
        self.sizes: Mapping[str, Any] = ExampleSizes(codes=CODES, codebooks=[CODES], grid=[1, POSITIONS])
        table = np.random.default_rng(0).standard_normal((VOCAB_SIZE + CODES, HIDDEN_SIZE)).astype(np.float32)
        self.words, self.codes = table[:VOCAB_SIZE], table[VOCAB_SIZE:]
        super().__init__(self.words, max_seq_len, rows)

    def run(self, name: str, *inputs: Any) -> Any:
        """Run one of the graphs that the built-in samplers call.

        Raises:
            NotApplicable: the graph is another generation path's.
        """
        graphs: dict[str, Callable[..., Any]] = {
            "embed": lambda tokens: self.words[tokens],
            "sample_text": self._sample_text,
            "sample_image": self._sample_image,
            "embed_codes": lambda codes: self.codes[codes],
            "decode_image": lambda codes: np.repeat(codes.astype(np.uint8)[:, None, None], 3, axis=1),
        }
        if name not in graphs:
            raise NotApplicable(f"the example's session has no graph '{name}': pass a session that has it")
        return graphs[name](*inputs)

    def _sample_text(self, hidden: Any, noise: Any, temperature: Any, *_: Any) -> tuple[Any, Any]:
        chosen = (_softmax(hidden @ self.words.T / temperature) / noise).argmax(-1)
        return chosen, self.words[chosen]

    def _sample_image(self, hidden: Any, noise: Any, guidance: Any, temperature: Any) -> tuple[Any, Any]:
        logits = (hidden @ self.codes.T).reshape(-1, len(noise), CODES)
        guided = logits[-1] + guidance * (logits[0] - logits[-1])
        chosen = (_softmax(guided / temperature) / noise).argmax(-1)
        return chosen, np.tile(self.codes[chosen], (len(logits), 1))

    def stack(self, columns: Many[Any]) -> Any:
        """Join arrays (rows,) of successive steps as (rows, steps)."""
        return np.stack(columns, axis=1)

    def to_host(self, x: Any) -> NDArray[Any]:
        """Copy an array."""
        return np.array(x)


def _softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
