"""Checks of what sessions are asked for, and their errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import PromptError
from janus_modular.suggest import did_you_mean

Integers = NDArray[np.int64]


def refuse_cut_states(shorter: Integers, lengths: Integers) -> None:
    """Raise an error if rows with states would be cut back: only the states after their last are known.

    Raises:
        PromptError: a row would be cut back, to a length that is neither 0 nor the length that it has.
    """
    if len(cut := np.flatnonzero((shorter > 0) & (shorter != lengths))):
        row = int(cut[0])
        raise PromptError(
            f"truncate: found length {shorter[row]} for row {row}; expected {lengths[row]}, all that it"
            " holds, or 0: the backbone's recurrent layers have a state after the last position alone. Feed"
            " what is to be dropped again with `extend` and counts of 0, or admit the prompt again."
        )


def encoded_images_refused() -> PromptError:
    """Return the error that the model embeds no given image in the form in which it draws."""
    return PromptError(
        "prompts: found an image in the form in which the model draws; expected images that are read"
        " (ImageInput): its generation path has no graph of the role 'embed'. Rectified flow embeds images"
        " with noise alone; a bundle for answers alone, or of an earlier version, may be exported again."
    )


def unknown_graph(name: str, known: Iterable[str]) -> PromptError:
    """Return the error that a session runs no graph of this name."""
    names = list(known)
    hint = did_you_mean(name, names)
    return PromptError(f"run: found the graph '{name}'; expected {', '.join(names)}. {hint}".rstrip())


def check_max_seq_len(max_seq_len: int, context: int) -> int:
    """Return the maximum positions of a session's rows, if the model's context is as long.

    Raises:
        PromptError: the context has fewer.
    """
    if is_integer(max_seq_len) and max_seq_len > context:
        raise PromptError(
            f"max_seq_len: found {max_seq_len}; expected {context} at most, the model's context. Shorten the"
            " prompt, or ask for fewer tokens."
        )
    return max_seq_len


def is_integer(value: Any) -> bool:
    """Return True for a whole number, of Python or numpy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
