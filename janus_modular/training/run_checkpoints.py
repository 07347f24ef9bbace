"""Checkpoints of a run: a model that can be used as it is, and beside it what training needs to go on."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from janus_modular.atomic_writes import remove_folder, restore_all
from janus_modular.checkpoints.native import MODEL_TYPE, Saves, read_record, stored_tensors, write_description
from janus_modular.config import to_plain
from janus_modular.errors import CheckpointError, TrainingError
from janus_modular.foreign import printable, reason
from janus_modular.locking import locked
from janus_modular.model.model import JanusModel
from janus_modular.training.changes import Change, changes, may_change, refused
from janus_modular.training.engine import Engine
from janus_modular.training.rescue import step_name
from janus_modular.training.schema import TrainConfig
from janus_modular.weights.checksums import (
    FILE,
    HashingFile,
    read_checksums,
    record,
    verify_checksums,
    write_checksums,
)
from janus_modular.weights.writing import is_checkpoint_file, link, replace_checkpoint, write_weights

STATE = "training.pt"
LOCK = ".lock"

ALMOST_NOTHING = 64 * 2**20
"""So few free bytes mean that the disk was full: what did not fit was given back, or never written."""


def save(
    output: Path,
    model: JanusModel,
    processor: Saves,
    engine: Engine[Any],
    config: TrainConfig,
    data: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/step-N`` aside and rename it; then drop all but the newest ``keep``.

    Raises:
        TrainingError: the state holds numbers that are not finite.
        CheckpointError: the disk did not take it.
    """
    engine.check_finite()
    folder = output / "checkpoints" / step_name(engine.next_step)
    record = {"step": engine.next_step, "config": to_plain(config), "data": data}
    with replace_checkpoint(folder, replaces=MODEL_TYPE) as aside:
        write_description(model, processor, aside, name=output.name, training=record)
        hashes = write_weights(aside, stored_tensors(model).items())
        hashes[STATE] = write_state(engine.state_dict(), aside / STATE)
        write_checksums(aside, hashes)
    drop_old(output, config.keep)
    return folder


def drop_old(output: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run, whoever left them there."""
    for old in _all(output)[:-keep]:
        remove_folder(old)


def write_state(state: Mapping[str, Any], path: Path) -> str:
    """Write an engine's state, tensors and plain containers; return the SHA-256 of the file.

    Raises:
        OSError: the disk did not take it; torch reports that as an internal error with a line of its source.
    """
    try:
        with HashingFile(path) as file:
            torch.save(state, cast(IO[bytes], file))
        return file.hexdigest()
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        if shutil.disk_usage(path.parent).free < ALMOST_NOTHING:
            raise OSError(errno.ENOSPC, "no space left on the disk", path.name) from error
        raise OSError(
            f"{path.name} was cut short; is there a quota, or a limit on the size of files?"
        ) from error


def finish(output: Path, checkpoint: Path) -> Path:
    """Put the model of a checkpoint at ``output/model``: as links, so that it takes no room of its own."""
    model = output / "model"
    with replace_checkpoint(model, replaces=MODEL_TYPE) as aside:
        shutil.copytree(
            checkpoint, aside, copy_function=link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STATE)
        )
        (aside / FILE).unlink()  # a link: what it leads to stays as it is
        record(aside, {name: one for name, one in read_checksums(checkpoint).items() if name != STATE})
    return model


def newest(output: Path) -> Path | None:
    """Return the checkpoint that a run would go on from: the newest that has a state."""
    return max(_all(output), default=None)


def passed_over(output: Path, chosen: Path) -> list[str]:
    """Name the checkpoints that are newer than the one chosen, and without the state that training needs."""
    return [one.name for one in _folders(output) if one.name > chosen.name]


def check_checkpoint(checkpoint: Path, config: TrainConfig) -> None:
    """Verify the files of a checkpoint before a run goes on from it, and that they are of one step.

    Raises:
        TrainingError: names the file that was changed, or what does not fit, and the way out.
    """
    try:
        if STATE not in verify_checksums(checkpoint, own=is_checkpoint_file):
            raise CheckpointError(f"{checkpoint / STATE} is not in {FILE}.")
        training = read_record(checkpoint).get("training")
        if not isinstance(training, dict) or not isinstance(training.get("config"), dict):
            raise CheckpointError(f"{checkpoint / 'config.json'} has no record of a training.")
        step = training.get("step")
        if type(step) is not int or step_name(step) != checkpoint.name:
            raise CheckpointError(
                f"{checkpoint / 'config.json'} is of step {step!r}, expected that of {checkpoint.name}."
            )
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"{error}\n{_way_out(checkpoint, config)}") from error


def check_same_run(checkpoint: Path, config: TrainConfig) -> list[Change]:
    """Return the settings that differ from those of a checkpoint, where a run may go on with them.

    Raises:
        TrainingError: some would make another run of it; names them, with both values. Or the run would
            end before the checkpoint.
    """
    differ = changes(read_record(checkpoint)["training"]["config"], to_plain(config))
    if wrong := [refused(change) for change in differ if not may_change(change)]:
        lines = "\n".join(wrong)
        raise TrainingError(
            f"{checkpoint} was made with other settings:\n{lines}\n"
            f"Put them back to resume, or start a new run from its weights: {_anew(checkpoint, config)}"
        )
    if checkpoint.name > step_name(config.schedule.last):
        raise TrainingError(
            f"{checkpoint} is beyond the last step, {config.schedule.last:,}: raise schedule.steps or"
            " schedule.stop to go on, or remove the later checkpoints."
        )
    return differ


def load_state(checkpoint: Path, engine: Engine[Any], config: TrainConfig) -> None:
    """Bring an engine to where ``checkpoint`` was written.

    Raises:
        TrainingError: its state is damaged, of another run, or of another step than its weights.
    """
    path = checkpoint / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if step_name(state["next_step"]) != checkpoint.name:
            raise ValueError(f"it is of step {state['next_step']}, expected that of {checkpoint.name}")
        engine.load_state_dict(state)
    except pickle.UnpicklingError as error:  # torch's words advise to load it all the same
        reason = "it is no file of torch.save, or holds more than tensors and plain containers"
        raise TrainingError(_damaged(path, reason, config)) from error
    except Exception as error:  # whatever torch raises over the bytes and numbers of a file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(_damaged(path, reason, config)) from error
    if names := engine.not_finite():
        reason = f"it or the weights hold numbers that are not finite, in {names[0]} first"
        raise TrainingError(_damaged(path, reason, config))


def _damaged(state: Path, reason: str, config: TrainConfig) -> str:
    """Return the message about a state that a run cannot go on from."""
    return f"{state} is damaged, or of another run: {reason}\n{_way_out(state.parent, config)}"


def _way_out(checkpoint: Path, config: TrainConfig) -> str:
    """Return how to go on without a checkpoint that cannot be relied upon."""
    before = [folder for folder in _all(checkpoint.parents[1]) if folder.name < checkpoint.name]
    if before:
        return f"Remove {checkpoint}, and --resume goes on from {before[-1].name}."
    return (
        "There is no checkpoint before it. Where its weights can be trusted, start a new run from them:"
        f" {_anew(checkpoint, config)}"
    )


def _anew(checkpoint: Path, config: TrainConfig) -> str:
    """Return the overrides of a run that begins with the weights of a checkpoint."""
    wrap = " wrap=null" if config.wrap is not None else ""
    return f"model=null init={checkpoint}{wrap} output=FOLDER"


def check_output(output: Path, option: str = "output=FOLDER") -> None:
    """Check that the folder of a run could be made and written, without making it; ``option`` names it.

    Raises:
        TrainingError: a file is in its way, its name is too long, or the disk is closed to us.
    """
    try:
        existing = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
        is_folder = existing.is_dir()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(output)  # a name may be too long, or hold NUL
    except (OSError, ValueError) as error:
        raise TrainingError(_unwritable(output, reason(error), option)) from error
    if not is_folder:
        raise TrainingError(_unwritable(output, f"{printable(existing, most=200)} is no folder", option))
    if not os.access(existing, os.W_OK | os.X_OK):
        why = f"{printable(existing, most=200)} may not be written into"
        raise TrainingError(_unwritable(output, why, option))


def _unwritable(output: Path, why: str, option: str = "output=FOLDER") -> str:
    return f"{printable(output, most=200)} cannot be written: {why}. Choose another {option}."


@contextmanager
def run_folder(output: Path) -> Iterator[None]:
    """Hold the folder of a run against other processes, and put right what a killed one has left there.

    Raises:
        TrainingError: another process trains there, or it cannot be written.
    """
    check_output(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(_unwritable(output, reason(error))) from error
    try:
        with locked(output / LOCK, output, error=TrainingError):
            for parent in (output, output / "checkpoints"):
                restore_all(parent, error=TrainingError)
            yield
    finally:
        with suppress(OSError):  # where nothing was begun, nothing is left
            output.rmdir()


def _all(output: Path) -> list[Path]:
    return [one for one in _folders(output) if (one / STATE).is_file()]


def _folders(output: Path) -> list[Path]:
    found = (output / "checkpoints").glob("step-*")
    return sorted(one for one in found if re.fullmatch(r"step-\d+", one.name))
