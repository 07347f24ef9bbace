"""What is made of a run's checkpoints: the final model, and the advice after an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from janus_modular.checkpoints.native import MODEL_TYPE
from janus_modular.errors import JanusError, TrainingError
from janus_modular.foreign import reason
from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.engine import Engine
from janus_modular.training.processes import RankError, describe_error
from janus_modular.training.run_folder import STATE, resumable_checkpoints, step_name
from janus_modular.weights.checksums import FILE, read_checksums, write_checksums
from janus_modular.weights.chunks import chunk_files
from janus_modular.weights.files import open_weights
from janus_modular.weights.writing import link, replace_checkpoint, write_weights


def link_final_model(output: Path, checkpoint: Path) -> Path:
    """Make ``output/model`` of a checkpoint, without the state of its training; return that folder.

    The files are links, which need no disk space; weights in chunks are written anew, a tensor at a time.
    """
    model, chunks = output / "model", [path.name for path in chunk_files(checkpoint)]
    with replace_checkpoint(model, replaces=MODEL_TYPE) as temporary:
        left_out = [STATE, "training*.safetensors", FILE, *chunks]
        shutil.copytree(
            checkpoint,
            temporary,
            copy_function=link,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*left_out),
        )
        hashes = read_checksums(checkpoint)
        if chunks:
            hashes |= write_weights(temporary, open_weights(checkpoint).items())
        write_checksums(temporary, hashes)
    return model


@contextmanager
def save_on_error(engine: Engine[Any], writer: CheckpointWriter, save: Callable[[], None]) -> Iterator[None]:
    """Save the state before the step that raises an error, and add to the error how to resume.

    Args:
        engine: performs the steps.
        writer: knows the checkpoint that was written last, or that the run resumed from.
        save: writes a checkpoint of the engine's state.

    Raises:
        JanusError: the error; an exception of another class becomes a `TrainingError`.
    """
    start = writer.last
    try:
        yield
    except JanusError as error:
        error.add_note(_save_finished_steps(error, engine, start, writer, save))
        raise
    except Exception as error:  # of a third-party component, or a MemoryError
        training_error = TrainingError(f"step {engine.next_step}: {describe_error(error)}")
        training_error.add_note(_save_finished_steps(error, engine, start, writer, save))
        raise training_error from error


def _save_finished_steps(
    error: Exception,
    engine: Engine[Any],
    start: Path | None,
    writer: CheckpointWriter,
    save: Callable[[], None],
) -> str:
    """Save the finished steps unless they are saved; return what is saved and how to resume."""
    done = engine.next_step
    steps, are = ("1 step", "is") if done == 1 else (f"{done:,} steps", "are")
    if not isinstance(error, RankError):
        with suppress(JanusError):  # of writing in the background; the first error must not be lost
            writer.complete()
    checkpoint = writer.last
    if checkpoint is not None and checkpoint.name == step_name(done):
        ruined = f" {_hint_without(checkpoint)}" if checkpoint == start else ""
        return f"The {steps} before it {are} saved. {_resume_hint(checkpoint)}{ruined}"
    if not done:
        return "No step was done before it, so nothing was lost."
    if isinstance(error, RankError):
        return (
            "The steps since the last checkpoint are not saved: the other ranks do not know of the error."
            f" {_resume_hint(checkpoint)}"
        )
    if not engine.consistent:
        return f"The error came during an update, so the weights are not saved. {_resume_hint(checkpoint)}"
    try:
        save()
    except Exception as error:  # reported beside the first error, which must not be lost
        return f"The {steps} before it could not be saved: {reason(error)}\n{_resume_hint(writer.last)}"
    return f"The {steps} before it {are} saved. {_resume_hint(writer.last)}"


def _resume_hint(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "There is no checkpoint to resume from."
    return f"Fix the cause, then resume from {checkpoint} with --resume; settings that help may be changed."


def _hint_without(checkpoint: Path) -> str:
    """Return how to continue if the first step after a resume fails because of the checkpoint's weights."""
    earlier = [
        path.name for path in resumable_checkpoints(checkpoint.parents[1]) if path.name < checkpoint.name
    ]
    hint = (
        f"--resume continues from {earlier[-1]}" if earlier else "and start a new run: no earlier one is left"
    )
    return f"If its weights are the cause, remove {checkpoint.name}; {hint}."
