"""Checkpoints of a run: a model that can be used as it is, and beside it what training needs to go on."""

from __future__ import annotations

import errno
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from janus_modular.atomic_writes import remove_folder
from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.checkpoints.native import MODEL_TYPE, read_record, stored_tensors, write_description
from janus_modular.config import flatten, to_plain
from janus_modular.errors import CheckpointError, JanusError, TrainingError
from janus_modular.foreign import reason
from janus_modular.training.engine import Engine
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

ALMOST_NOTHING = 64 * 2**20
"""So few free bytes mean that the disk was full: what did not fit was given back, or never written."""


def save(
    output: Path,
    assembly: ModelAssembly,
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
        write_description(assembly, aside, name=output.name, training=record)
        hashes = write_weights(aside, stored_tensors(assembly.model).items())
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


def newest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint that a run would go on from: the newest that has a state."""
    return max(_all(output), default=None)


def newer_without_state(output: Path, chosen: Path) -> list[str]:
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
    if wrong := [refused(change) for change in differ if not may_change_on_resume(change)]:
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


def _all(output: Path) -> list[Path]:
    return [one for one in _folders(output) if (one / STATE).is_file()]


def _folders(output: Path) -> list[Path]:
    found = (output / "checkpoints").glob("step-*")
    return sorted(one for one in found if re.fullmatch(r"step-\d+", one.name))


IRRELEVANT = {
    "changed_data",
    "workers",
    "device",
    "checkpoint_every",
    "keep",
    "log_every",
    "output",
    "trackers",
}
"""No step is computed from these."""

REPAIRS = {
    "bad_samples",
    "optimizer",
    "schedule",
    "length",
    "accumulate",
    "supervise",
    "condition_dropout",
    "dtype",
}
"""Steps are computed from these, and a run may need to change them to go on; options of sources, too."""

REASONS = {
    "init": "a run begins once",
    "batch": "the order of samples follows from it; to need less memory, raise accumulate",
    "mixture": "the order of samples follows from it",
    "seed": "the order of samples follows from it",
    "sources": "the order of samples follows from their names",
    "learn": "the optimizer's state belongs to what learned",
    "model": "the checkpoint holds the model",
    "wrap": "the checkpoint holds the model",
}
"""Why the others may not."""


@dataclass(frozen=True)
class Change:
    """A setting that differs."""

    key: str
    then: Any  # in the checkpoint
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.then!r} then, {self.now!r} now"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two plain configs, by dotted keys; not what no step is computed from."""
    before, after = flatten(then), flatten(now)
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.partition(".")[0] not in IRRELEVANT
    ]


def may_change_on_resume(change: Change) -> bool:
    """Return whether a run may go on with a change."""
    first, *rest = change.key.split(".")
    is_option = first == "sources" and len(rest) > 1 and rest[1] != "name"
    return first in REPAIRS or is_option


def refused(change: Change) -> str:
    """Return a line about a change that a run may not go on with."""
    reason = REASONS.get(change.key.partition(".")[0])
    return f"  {change} ({reason})" if reason else f"  {change}"


@contextmanager
def save_on_error(
    engine: Engine[Any], newest_checkpoint: Callable[[], Path | None], save: Callable[[], Path]
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
        error.add_note(_saved(engine, newest_checkpoint, save))
        raise
    except Exception as error:  # of a plugin, say; MemoryError too
        failure = TrainingError(f"step {engine.next_step}: {_described(error)}")
        failure.add_note(_saved(engine, newest_checkpoint, save))
        raise failure from error


def _saved(
    engine: Engine[Any], newest_checkpoint: Callable[[], Path | None], save: Callable[[], Path]
) -> str:
    """Save what is not saved yet; return what stands and what to do."""
    done, last = engine.next_step, newest_checkpoint()
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
        return f"The {steps} before it could not be saved: {reason(error)}\n{_go_on(newest_checkpoint())}"
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
