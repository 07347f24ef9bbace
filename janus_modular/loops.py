"""Holding a running sampling loop to its protocol, so that one that is meant for something else is named.

What is expected of whom stands in `janus_modular.roles.Sampling`. No torch in here.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import CheckError


def settings_that_answer(loop: str, settings: Any) -> Any:
    """Return the settings of a loop that is to answer: they have ``max_tokens``.

    Raises:
        CheckError: they have not.
    """
    if not hasattr(settings, "max_tokens"):
        raise _broken(loop, "answers", "its settings have no max_tokens", "a number that limits the answer")
    return settings


def tokens(loop: str, yielded: Any, rows: int) -> NDArray[np.integer[Any]]:
    """Return what a loop that answers yielded: the token id that each row says next.

    Raises:
        CheckError: it is something else.
    """
    fits = isinstance(yielded, np.ndarray) and yielded.shape == (rows,) and yielded.dtype.kind in "iu"
    if not fits:
        raise _broken(loop, "answers", f"it yielded {_seen(yielded)}", f"token ids, whole numbers ({rows},)")
    return yielded


def steps(loop: str, yielded: Any) -> tuple[int, int]:
    """Return what a loop that draws yielded: the steps done and the steps in all.

    Raises:
        CheckError: it is something else.
    """
    if isinstance(yielded, tuple) and [isinstance(one, Integral) for one in yielded] == [True, True]:
        return yielded
    raise _broken(loop, "draws", f"it yielded {_seen(yielded)}", "(steps done, steps in all)")


def pictures(loop: str, returned: Any, rows: int) -> NDArray[Any]:
    """Return what a loop that draws returned: one picture a row.

    Raises:
        CheckError: it is something else.
    """
    fits = isinstance(returned, np.ndarray) and returned.ndim == 4 and returned.shape[:2] == (rows, 3)
    if not fits:
        raise _broken(loop, "draws", f"it returned {_seen(returned)}", f"pixels ({rows}, 3, H, W)")
    return returned


def _broken(loop: str, does: str, found: str, expected: str) -> CheckError:
    return CheckError(
        f"the sampling loop '{loop}' is none that {does}: {found}; expected {expected}.\n"
        f"Use one that {does}, or mend it: docs/reference/hooks.md says what such a loop does."
    )


def _seen(x: Any) -> str:
    return f"an array {x.shape} of {x.dtype}" if isinstance(x, np.ndarray) else f"{x!r:.60}"
