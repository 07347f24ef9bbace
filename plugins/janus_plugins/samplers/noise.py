"""The noise by which ids are sampled: Exp(1), from one random generator a row; no torch in here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST = np.float32(2.0**-25)
"""In place of 0, about half of numpy's smallest steps: in float32 it returns 0 once in 8 million numbers."""


def exponential_noise(rngs: Sequence[np.random.Generator], width: int) -> NDArray[np.float32]:
    """Return noise (rows, width), above 0 everywhere.

    Sampling takes argmax(p / noise). A 0 would take its id however unlikely that is, one with p = 0 included:
    with a vocabulary of 100,000 at one token in 80.
    """
    noise = np.stack([rng.standard_exponential(width, np.float32) for rng in rngs])
    return np.maximum(noise, LEAST, out=noise)
