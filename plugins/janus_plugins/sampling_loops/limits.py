"""What a setting of a sampling loop may be; no torch in here."""

from __future__ import annotations

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
