"""Lock files for one writer at a time; the system releases a lock when its process ends.

The holder removes the lock file. A file that a killed process has left is locked again and then removed.
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
    """Hold the lock ``file`` while ``subject`` is written; wait or raise if another writer holds it.

    The lock excludes other processes and other threads of this process. Windows has no such lock: there, two
    writers of a folder are not kept apart.

    Args:
        file: the lock file; its folder must exist.
        subject: what is written, for messages.
        wait: wait until the lock is free.
        error: the class of errors to raise.

    Raises:
        JanusError: (an ``error``) another process has the lock and ``wait`` is False, or the lock file
            cannot be created or locked.
    """
    if sys.platform == "win32":
        yield
        return
    handle = _acquire(file, subject, wait, error)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder was removed or is read-only; closing releases the lock
            if _is_at(handle, file):  # False if the lock's folder was replaced meanwhile
                file.unlink()
        handle.close()


def is_locked(file: Path) -> bool:
    """Return True if a process holds the lock ``file``; nothing is written. Always False on Windows.

    A shared lock is taken and released at once; a process that tries to lock the file in between fails as if
    another process was writing.

    Raises:
        OSError: the file exists and cannot be read.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _acquire(file: Path, subject: Path, wait: bool, error: type[JanusError]) -> TextIO:
    """Lock a file, and check that it still exists: its last holder may have removed it meanwhile."""
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
                f"{subject} could not be locked: {failure}. Use a disk with free space and file locks."
            ) from failure
        handle.close()


def _is_at(handle: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(file))
    except FileNotFoundError:
        return False
