"""What an error leaves of a run: the steps before it, in a checkpoint, and a word on how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from janus_modular.errors import JanusError, TrainingError
from janus_modular.foreign import reason
from janus_modular.training.engine import Engine


@contextmanager
def saving_sound_steps(
    engine: Engine[Any], newest: Callable[[], Path | None], save: Callable[[], Path]
) -> Iterator[None]:
    """Save the state before a step in which an error occurs, and add to the error how to go on.

    Args:
        engine: takes the steps.
        newest: returns the checkpoint that was written last, or that the run began with.
        save: writes a checkpoint of the engine's state, and returns it.

    Raises:
        JanusError: what occurred; an exception of another class becomes a `TrainingError`.
    """
    try:
        yield
    except JanusError as error:
        error.add_note(_saved(engine, newest, save))
        raise
    except Exception as error:  # of a plugin, say; MemoryError too
        failure = TrainingError(f"step {engine.next_step}: {_described(error)}")
        failure.add_note(_saved(engine, newest, save))
        raise failure from error


def _saved(engine: Engine[Any], newest: Callable[[], Path | None], save: Callable[[], Path]) -> str:
    """Save what is not saved yet; return what stands and what to do."""
    done, last = engine.next_step, newest()
    steps, are = ("1 step", "is") if done == 1 else (f"{done:,} steps", "are")
    if last is not None and last.name == step_name(done):
        return f"The {steps} before it {are} saved. {_go_on(last)}"
    if not done:
        return "No step was done before it, so nothing was lost."
    if not engine.sound:
        return f"The weights were being changed just then, so they are not saved. {_go_on(last)}"
    try:
        last = save()
    except Exception as error:  # of a component that is saved, say: the error at hand is not lost over it
        return f"The {steps} before it could not be saved: {reason(error)}\n{_go_on(newest())}"
    return f"The {steps} before it {are} saved. {_go_on(last)}"


def step_name(step: int) -> str:
    """Return the name of the checkpoint after so many steps."""
    return f"step-{step:07}"


def _go_on(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "There is no checkpoint to go on from."
    return (
        f"Put the cause right, then go on from {checkpoint} with --resume; settings that help may be changed."
    )


def _described(error: Exception) -> str:
    words = str(error).partition("\n")[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in words:
        return (
            f"out of memory ({words or type(error).__name__}). Raise accumulate, which computes the same in"
            " smaller pieces, or lower length."
        )
    return f"{type(error).__name__}: {words or 'no message'}. Where it comes from: --traceback"
