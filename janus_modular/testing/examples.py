"""What checks need beside a component where one tensor does not do; and a session that costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.protocols import Session
from janus_modular.sequence import IGNORE_INDEX, Sequence
from janus_modular.testing.check import NotApplicable

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, VOCABULARY, CODES, POSITIONS = 6, 11, 7, 4
"""Sizes of `NumpySession`: of a hidden state, in tokens, in codes, of an image."""


@dataclass
class SamplingExample:
    """What a sampler is run on."""

    settings: Any  # the dataclass that is registered with it
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
    nowhere = np.zeros(len(ids), np.bool_)
    return Sequence(ids, np.full_like(ids, IGNORE_INDEX), nowhere, nowhere.copy())


class ExampleSizes(dict[str, Any]):
    """Sizes of the example's session; others may be those of a generation path that has them."""

    def __missing__(self, name: str) -> Any:
        raise NotApplicable(f"the example's session has no size '{name}': give one that has")


class NumpySession:
    """A `janus_modular.Session` over a recurrence in numpy: rows are independent, and nothing is random."""

    def __init__(self) -> None:
        self.vocab_size, self.pad_id, self.image_positions = VOCABULARY, 0, POSITIONS
        self.sizes: Mapping[str, Any] = ExampleSizes(codes=CODES)
        table = np.random.default_rng(0).standard_normal((VOCABULARY + CODES, WIDTH)).astype(np.float32)
        self.words, self.codes = table[:VOCABULARY], table[VOCABULARY:]
        self.hidden = np.zeros((0, WIDTH), np.float32)

    def prefill(self, prompts: Many[Sequence]) -> NDArray[np.float32]:
        """Read one prompt a row."""
        weights = 0.5 ** np.arange(64)
        self.hidden = np.stack(
            [weights[: len(one)][::-1] @ self.words[one.tokens] for one in prompts]
        ).astype(np.float32)
        return self.hidden

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Feed one embedding a row."""
        moved = np.tanh(0.5 * self.hidden + x)
        self.hidden = moved if active is None else np.where(active[:, None], moved, self.hidden)
        return self.hidden

    def run(self, part: str, *inputs: Any) -> Any:
        """Run one of the parts that the built-in samplers call.

        Raises:
            NotApplicable: another part, which other generation paths have.
        """
        parts: dict[str, Callable[..., Any]] = {
            "sample_text": self._sample_text,
            "sample_image": self._sample_image,
            "decode_image": lambda codes: np.repeat(codes.astype(np.uint8)[:, None, None], 3, axis=1),
        }
        if part not in parts:
            raise NotApplicable(f"the example's session has no part '{part}': give one that has")
        return parts[part](*inputs)

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
        """Everything is on the host."""
        return np.asarray(x)


def _softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
