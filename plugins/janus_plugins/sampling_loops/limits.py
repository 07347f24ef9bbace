"""What a setting of a sampling loop may be; no torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

from janus_modular import PromptError


def check_setting(
    name: str, value: Any, expected: str, *, low: float | None = None, high: float | None = None
) -> None:
    """Check that a setting is a finite number within its limits; ``expected`` says them in words.

    Raises:
        PromptError: it is not. Nothing would stop it later: a NaN draws noise, a negative limit all tokens.
    """
    kind = Integral if expected.startswith("a whole number") else Real
    fits = isinstance(value, kind) and isfinite(value)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        raise PromptError(f"{name}: found {value!r}; expected {expected}.")


def check_numbers(name: str, values: Any) -> None:
    """Check that a setting is a sequence of whole numbers from 0, one for each row.

    Raises:
        PromptError: it is not.
    """
    expected = "a list of whole numbers from 0, one for each row"
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PromptError(f"{name}: found {values!r}; expected {expected}.")
    for value in values:
        if not isinstance(value, Integral) or value < 0:
            raise PromptError(f"{name}: found {value!r}; expected {expected}.")
