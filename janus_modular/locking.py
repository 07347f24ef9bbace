"""One writer at a time, by lock files that the system releases when their process ends, however it ends.

A lock file is removed by its holder, so that none stays in what is finished. One that a killed process has
left holds nobody up: it is locked again and then removed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from janus_modular.errors import JanusError


@contextmanager
def locked(
    file: Path, subject: Path, *, wait: bool = False, error: type[JanusError] = JanusError
) -> Iterator[None]:
    """Hold the lock ``file`` while ``subject`` is written; where another has it, wait or refuse.

    Another process and another thread of this one are both kept out. Windows has no such lock: there,
    nothing is held, and two writers of one folder are not kept apart.

    Args:
        file: the lock file; its folder must exist.
        subject: what is written, for messages.
        wait: wait until the holder lets go.
        error: the class of what is raised.

    Raises:
        JanusError: (an ``error``) another process has it and ``wait`` is False, or no lock can be had there.
    """
    if sys.platform == "win32":
        yield
        return
    handle = _acquire(file, subject, wait, error)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that was removed or became read-only: the lock goes all the same
            if _is_at(handle, file):  # not where the folder of the lock was replaced meanwhile
                file.unlink()
        handle.close()


def _acquire(file: Path, subject: Path, wait: bool, error: type[JanusError]) -> TextIO:
    """Lock a file, and make sure that it still lies there: its last holder may have removed it meanwhile."""
    import fcntl

    while True:
        try:
            handle = file.open("a+", encoding="utf-8")
        except OSError as failure:
            raise error(
                f"{subject} could not be written: {failure}. Make {file.parent} writable."
            ) from failure
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(handle, file):
                handle.truncate(0)
                handle.write(f"{os.getpid()}\n")
                handle.flush()
                return handle
        except BlockingIOError as failure:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise error(
                f"another process is writing {subject} (process {holder}). Wait for it, or choose another"
                " folder."
            ) from failure
        except OSError as failure:
            handle.close()
            raise error(
                f"{subject} could not be locked: {failure}. Use a disk that has room and can lock files."
            ) from failure
        handle.close()


def _is_at(handle: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(file))
    except FileNotFoundError:
        return False
