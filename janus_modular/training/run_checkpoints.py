"""Checkpoints of a run: each is a complete model, with the state that training resumes from beside it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

from janus_modular.atomic_writes import remove_folder
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.native import MODEL_TYPE, stored_tensors, write_description
from janus_modular.config import to_plain
from janus_modular.errors import JanusError, TrainingError
from janus_modular.foreign import reason
from janus_modular.training.engine import Engine
from janus_modular.training.parallel import full_tensor
from janus_modular.training.processes import RankError, describe_error
from janus_modular.training.run_folder import STATE, resumable_checkpoints, step_name
from janus_modular.training.schema import TrainConfig
from janus_modular.weights.checksums import FILE, HashingFile, read_checksums, record, write_checksums
from janus_modular.weights.writing import link, replace_checkpoint, write_weights

DISK_FULL_BELOW = 64 * 2**20
"""With fewer free bytes after a failed write, the disk was full: what did not fit has been released again."""


def save(
    output: Path,
    assembly: ModelAssembly,
    engine: Engine[Any],
    config: TrainConfig,
    record: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/step-N`` atomically and remove all but the newest ``config.keep``; return its path.

    ``record`` is what config.json says of the training beside step and config: the data, for example. All
    processes of a run call this, and the first of them writes.

    Raises:
        TrainingError: the state holds numbers that are not finite.
        CheckpointError: writing failed.
    """
    engine.check_finite()
    folder = output / "checkpoints" / step_name(engine.next_step)
    training = {"step": engine.next_step, "config": to_plain(config), **record}
    state, keep = engine.state_dict(), engine.processes.is_first
    whole = {name: full_tensor(x, keep=keep) for name, x in stored_tensors(assembly.model).items()}
    weights = {name: tensor for name, tensor in whole.items() if tensor is not None}

    def write() -> None:
        with replace_checkpoint(folder, replaces=MODEL_TYPE) as temporary:
            write_description(assembly, temporary, name=output.name, training=training)
            hashes = write_weights(temporary, weights.items())
            hashes[STATE] = write_state(state, temporary / STATE)
            write_checksums(temporary, hashes)
        drop_old(output, config.keep)

    engine.processes.on_first(write)
    return folder


def drop_old(output: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run, whichever process wrote them."""
    for checkpoint in resumable_checkpoints(output)[:-keep]:
        remove_folder(checkpoint)


def write_state(state: Mapping[str, Any], path: Path) -> str:
    """Write the state of an engine, tensors and plain containers; return the SHA-256 of the file.

    Raises:
        OSError: writing failed; torch reports that as an internal error with a line of its source.
    """
    try:
        with HashingFile(path) as file:
            torch.save(state, cast(IO[bytes], file))
        return file.hexdigest()
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        if shutil.disk_usage(path.parent).free < DISK_FULL_BELOW:
            raise OSError(errno.ENOSPC, "no space left on the disk", path.name) from error
        raise OSError(
            f"{path.name} was cut short; is there a quota, or a limit on the size of files?"
        ) from error


def link_final_model(output: Path, checkpoint: Path) -> Path:
    """Link the model of a checkpoint into ``output/model``, which needs no disk space; return that folder."""
    model = output / "model"
    with replace_checkpoint(model, replaces=MODEL_TYPE) as temporary:
        shutil.copytree(
            checkpoint,
            temporary,
            copy_function=link,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(STATE),
        )
        (temporary / FILE).unlink()  # a link: the checkpoint keeps its own list
        hashes = read_checksums(checkpoint)
        record(temporary, {name: sha256 for name, sha256 in hashes.items() if name != STATE})
    return model


@contextmanager
def save_on_error(
    engine: Engine[Any], last_saved: Callable[[], Path | None], save: Callable[[], Path]
) -> Iterator[None]:
    """Save the state before the step that raises an error, and add to the error how to resume.

    Args:
        engine: performs the steps.
        last_saved: returns the checkpoint that was written last, or that the run resumed from.
        save: writes a checkpoint of the engine's state, and returns its path.

    Raises:
        JanusError: the error; an exception of another class becomes a `TrainingError`.
    """
    start = last_saved()
    try:
        yield
    except JanusError as error:
        error.add_note(_save_finished_steps(error, engine, start, last_saved, save))
        raise
    except Exception as error:  # of a third-party component, or a MemoryError
        training_error = TrainingError(f"step {engine.next_step}: {describe_error(error)}")
        training_error.add_note(_save_finished_steps(error, engine, start, last_saved, save))
        raise training_error from error


def _save_finished_steps(
    error: Exception,
    engine: Engine[Any],
    start: Path | None,
    last_saved: Callable[[], Path | None],
    save: Callable[[], Path],
) -> str:
    """Save the finished steps unless they are saved; return what is saved and how to resume."""
    done, checkpoint = engine.next_step, last_saved()
    steps, are = ("1 step", "is") if done == 1 else (f"{done:,} steps", "are")
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
        checkpoint = save()
    except Exception as error:  # reported beside the first error, which must not be lost
        return f"The {steps} before it could not be saved: {reason(error)}\n{_resume_hint(last_saved())}"
    return f"The {steps} before it {are} saved. {_resume_hint(checkpoint)}"


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
