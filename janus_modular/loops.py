"""Driving sampling loops: what each row is told, and holding a loop to its protocol.

What is expected of whom stands in `janus_modular.protocols.Sampling`. No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.answers import AnswerRow
from janus_modular.errors import CheckError, JanusError, NotFiniteError, PromptError
from janus_modular.protocols import Sampling
from janus_modular.sequence import Sequence as Prompt
from janus_modular.sequence import occurrences

if TYPE_CHECKING:
    from janus_modular.model.model import JanusModel
    from janus_modular.plugins import Plugins

OVER = object()
"""Stands where a loop that has ended yields nothing more."""


def settings_that_answer(loop: str, settings: Any) -> Any:
    """Return the settings of a loop that is to answer: they have ``max_tokens``.

    Raises:
        CheckError: they have not.
    """
    if not hasattr(settings, "max_tokens"):
        raise _broken(loop, "answers", "its settings have no max_tokens", "a number that limits the answer")
    return settings


def refusals(model: JanusModel, plugins: Plugins) -> dict[str, str]:
    """Return why a model's sampling loops cannot be used, by command: ``chat``, ``draw``; {} where they can.

    Such a model opens all the same: who chats needs no loop that draws.
    """
    here = plugins.as_recorded(model.recorded)
    reasons = {}
    for command, name in (("chat", model.config.text_sampler), ("draw", model.generation.image_sampler)):
        try:
            entry = here.entry("sampling_loops", name)
            if command == "chat":
                settings_that_answer(name, entry.config())
        except JanusError as error:
            reasons[command] = str(error)
    return reasons


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


def images(loop: str, returned: Any, rows: int) -> NDArray[Any]:
    """Return what a loop that draws returned: one image a row.

    Raises:
        CheckError: it is something else.
        NotFiniteError: pixels are NaN or infinite.
    """
    fits = isinstance(returned, np.ndarray) and returned.ndim == 4 and returned.shape[:2] == (rows, 3)
    if not fits:
        raise _broken(loop, "draws", f"it returned {_seen(returned)}", f"pixels ({rows}, 3, H, W)")
    if returned.dtype.kind == "f" and not np.isfinite(returned).all():
        raise NotFiniteError(f"the sampling loop '{loop}' returned pixels that are NaN or infinite")
    return returned


def texts(loop: str, run: Sampling, rows: Sequence[AnswerRow]) -> Iterator[tuple[int, str]]:
    """Hand the tokens of a sampling loop to their rows; yield (row, text), until all rows have ended."""
    yielded = next(run, OVER)
    while yielded is not OVER:
        ids = tokens(loop, yielded, len(rows))
        for index, row in enumerate(rows):
            if row.is_active and (text := row.push(int(ids[index]))):
                yield index, text
        active = np.array([row.is_active for row in rows])
        if not active.any():
            run.close()
            return
        yielded = _sent(run, active)
    for index, row in enumerate(rows):
        if row.is_active and (text := row.end()):
            yield index, text


def numbered(settings: Any, prompts: Sequence[Prompt]) -> Any:
    """Give a loop that takes ``numbers`` those of its rows: how often each prompt came before."""
    if not hasattr(settings, "numbers"):
        return settings
    if len(settings.numbers) not in (0, len(prompts)):
        raise PromptError(f"numbers: found {len(settings.numbers)}; expected one for each of {len(prompts)}.")
    first = getattr(settings, "first", 0)
    numbers = settings.numbers or [first + number for number in occurrences(prompts)]
    return replace(settings, numbers=tuple(numbers))


def batches(
    loop: str, settings: Any, prompts: Sequence[Prompt], size: int
) -> list[tuple[Sequence[Prompt], Any]]:
    """Return batches of prompts, each with its settings: noise goes by an image's number.

    A loop that takes ``numbers`` draws any prompts side by side, one that only takes ``first`` those whose
    numbers follow each other, and any other a single batch.

    Raises:
        PromptError: there is more than one batch, and the loop draws one alone.
    """
    if hasattr(settings, "numbers"):
        settings = numbered(settings, prompts)
        return [
            (prompts[at : at + size], replace(settings, numbers=settings.numbers[at : at + size]))
            for at in range(0, len(prompts), size)
        ]
    if hasattr(settings, "first"):
        numbers = occurrences(prompts)
        starts = [0] if prompts else []
        for at in range(1, len(prompts)):
            if at - starts[-1] == size or numbers[at] != numbers[at - 1] + 1:
                starts.append(at)
        return [
            (prompts[start:end], replace(settings, first=settings.first + numbers[start]))
            for start, end in pairwise([*starts, len(prompts)])
        ]
    if len(prompts) > size:
        raise PromptError(
            f"the loop '{loop}' draws one batch alone: it has no setting 'first', the number of a batch's"
            f" first image. Found {len(prompts)} images, {size} at once; draw fewer, or give"
            f" batch_size={len(prompts)}."
        )
    return [(prompts, settings)]


def finish(loop: str, run: Sampling, tell: Callable[..., None]) -> Any:
    """Let a loop that draws finish, telling of every step; return what it made."""
    while True:
        try:
            yielded = next(run)
        except StopIteration as stop:
            return stop.value
        tell(*steps(loop, yielded))


def _broken(loop: str, does: str, found: str, expected: str) -> CheckError:
    return CheckError(
        f"the sampling loop '{loop}' is none that {does}: {found}; expected {expected}.\n"
        f"Use one that {does}, or mend it: docs/reference/hooks.md says what such a loop does."
    )


def _seen(x: Any) -> str:
    return f"an array {x.shape} of {x.dtype}" if isinstance(x, np.ndarray) else f"{x!r:.60}"


def _sent(run: Sampling, value: Any) -> Any:
    try:
        return run.send(value)
    except StopIteration:
        return OVER
