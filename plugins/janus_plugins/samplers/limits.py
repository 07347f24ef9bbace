"""Ranges of samplers' settings, checked as the numbers that are computed with. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from janus_modular import PromptError

LEAST_TEMPERATURE = 1e-6
"""Least temperature above 0, in effect greedy: logits of up to 1e32 divided by it are finite in float32."""

MOST_GUIDANCE = 1e6
"""Logits of up to 1e32 multiplied by it are finite in float32."""

LEAST_TOP_P = float(np.finfo(np.float32).tiny)
"""Smaller numbers are 0 on some processors."""

MOST_INTEGER = 2**63 - 1
"""Graphs take int64."""


def check_integer(name: str, value: Any, expected: str, *, low: int, high: int | None = None) -> int:
    """Return a setting as an int; ``expected`` is how an error describes the range.

    Raises:
        PromptError: the value is not a whole number (True and 2.0 are not), or is out of range.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise PromptError(f"{name}: found {_shortened(value)}; expected {expected}.")
    return int(value)


def check_integers(name: str, values: Any) -> tuple[int, ...]:
    """Return a setting as a tuple of ints from 0, one for each row.

    Raises:
        PromptError: the values are no sequence of whole numbers from 0.
    """
    expected = "a list of whole numbers from 0, one for each row"
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PromptError(f"{name}: found {_shortened(values)}; expected {expected}.")
    return tuple(check_integer(name, value, expected, low=0) for value in values)


def check_codes(name: str, values: Any) -> tuple[Any, ...]:
    """Return codes (k,) or (k, S) as a tuple of ints, or of tuples of ints.

    Raises:
        PromptError: the values are no whole numbers from 0, or lists of different lengths.
    """
    expected = "a list of whole numbers from 0, or of equally long lists of these"
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PromptError(f"{name}: found {_shortened(values)}; expected {expected}.")
    codes = tuple(
        tuple(check_integer(name, code, expected, low=0) for code in value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else check_integer(name, value, expected, low=0)
        for value in values
    )
    if len({len(code) if isinstance(code, tuple) else 0 for code in codes}) > 1:
        raise PromptError(f"{name}: found {_shortened(values)}; expected {expected}.")
    return codes


def check_float(name: str, value: Any, expected: str, *, low: float, high: float) -> float:
    """Return a setting as a float; ``expected`` is how an error describes the range.

    Checked is the value in float32, the input type of graphs: 1e-50 is 0 there, and 1e39 infinite.

    Raises:
        PromptError: the value is no number (nor is True), not finite, or out of range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise PromptError(f"{name}: found {_shortened(value)}; expected {expected}.")
    try:
        with np.errstate(over="ignore", under="ignore"):
            number = float(np.float32(float(value)))
    except OverflowError:  # a whole number or a fraction beyond any float
        number = float("inf")
    if not isfinite(number) or not np.float32(low) <= number <= np.float32(high):
        raise PromptError(f"{name}: found {_shortened(value)}; expected {expected}.")
    return float(value)


def check_temperature(value: Any) -> float:
    """Return a temperature: 0, which is greedy, or a number by which logits can be divided.

    Raises:
        PromptError: the value is neither.
    """
    expected = f"0, which is greedy, or a number from {LEAST_TEMPERATURE:g} that float32 holds"
    if isinstance(value, Real) and not isinstance(value, bool) and value == 0:
        return 0.0
    return check_float(
        "temperature", value, expected, low=LEAST_TEMPERATURE, high=float(np.finfo(np.float32).max)
    )


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"a whole number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:60]}..."
