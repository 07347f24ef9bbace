"""The output folder of a run: who may write it, and that it can be written, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from janus_modular.atomic_writes import restore_all
from janus_modular.errors import TrainingError
from janus_modular.foreign import printable, reason
from janus_modular.locking import locked

LOCK = ".lock"

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""In which variables launchers (torchrun, accelerate, mpirun, srun) say how many processes they started."""


def check_single_process() -> None:
    """Refuse to train as one of several processes: each would train the same model on the same samples.

    Raises:
        TrainingError: a launcher has started more than one process.
    """
    for name in COUNTS:
        if (count := os.environ.get(name, "")).strip() not in ("", "1"):
            raise TrainingError(
                f"{name}={count}: a launcher started several processes, and training on several is not"
                " supported yet: each would train the same model on the same samples. Start one process,"
                f" without torchrun or the like; where {name} is left over from something else, unset it."
            )


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
