"""The output folder of a run: its checkpoints by name, a check that it can be written, and a lock.

Imports no torch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from janus_modular.atomic_writes import remove_folder, restore_all, temporary_path
from janus_modular.errors import TrainingError
from janus_modular.foreign import printable, reason
from janus_modular.locking import locked
from janus_modular.weights.checksums import FILE

log = logging.getLogger(__name__)

LOCK = ".lock"

STATE = "training.json"
"""The file of a checkpoint that records what training resumes from, beside ``training*.safetensors``."""

LATEST = "latest"
"""The link in the folder of checkpoints to the newest one."""

COMPLETE = (STATE, FILE)
"""The files without which a checkpoint cannot be resumed from; the checksums are written last."""

VALIDATION = "validation"
"""The folder of drawings and answers, and the prefix of the metrics, of validation."""

PROBE = ".janus-modular-probe"
"""The folder that is made, and removed, to see whether anything can be made."""


def check_output(output: Path, option: str = "output=FOLDER") -> None:
    """Check that the folder of a run could be made and written, without making it; ``option`` names it.

    Permissions alone can mislead (read-only and network disks), so a probe folder is created in the nearest
    existing folder, and removed.

    Raises:
        TrainingError: a file is in the way, the name is too long, or nothing can be written there.
    """
    try:
        existing = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
        is_folder = existing.is_dir()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(output)  # a name may be too long, or hold NUL
    except (OSError, ValueError) as error:
        raise TrainingError(_unwritable(output, reason(error), option)) from error
    name = printable(existing, most=200)
    if not is_folder:
        raise TrainingError(_unwritable(output, f"{name} is no folder", option))
    try:
        with suppress(FileExistsError):  # left by a process that was killed here
            os.mkdir(existing / PROBE)
        with suppress(FileNotFoundError):  # removed by another process
            os.rmdir(existing / PROBE)
    except OSError as error:
        raise TrainingError(
            _unwritable(output, f"{name} may not be written into ({error.strerror})", option)
        ) from error


def _unwritable(output: Path, problem: str, option: str = "output=FOLDER") -> str:
    return f"{printable(output, most=200)} cannot be written: {problem}. Choose another {option}."


@contextmanager
def run_folder(output: Path) -> Iterator[None]:
    """Lock the folder of a run against other processes, and clean up after a process that was killed.

    Raises:
        TrainingError: another process trains there, or the folder cannot be written.
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
        with suppress(OSError):  # removes the folder only if it is empty
            output.rmdir()


def step_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step-{step:07}"


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint that training can resume from."""
    return max(resumable_checkpoints(output), default=None)


def incomplete_checkpoints(output: Path) -> list[str]:
    """Return a note on each checkpoint that cannot be resumed from: its name, and the file that it lacks."""
    return [
        f"{folder.name} cannot be resumed from: no {missing[0]}"
        for folder in checkpoint_folders(output)
        if (missing := [name for name in COMPLETE if not (folder / name).is_file()])
    ]


def resumable_checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints that have a training state, the oldest first."""
    return [
        folder for folder in checkpoint_folders(output) if all((folder / name).is_file() for name in COMPLETE)
    ]


def drop_old(output: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints of a run, whichever process wrote them."""
    for checkpoint in resumable_checkpoints(output)[:-keep]:
        remove_folder(checkpoint)


def point_latest(checkpoint: Path) -> None:
    """Make the link ``latest`` beside a checkpoint point to it, for users; a resume looks at the folders.

    Where the file system has no links, a warning says so.
    """
    link = checkpoint.parent / LATEST
    temporary = temporary_path(link, "new")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        log.warning("%s does not point to %s: %s", link, checkpoint.name, error.strerror)


def checkpoint_folders(output: Path) -> list[Path]:
    """Return all checkpoints of a run, the oldest first."""
    return step_folders(output / "checkpoints")


def step_folders(parent: Path) -> list[Path]:
    """Return the folders ``step-N`` in ``parent``, the earliest step first."""
    return sorted(path for path in parent.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
