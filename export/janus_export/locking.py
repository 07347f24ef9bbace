"""One writer at a time in a bundle's folder, by the lock that the system drops when a process ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from janus_export.errors import BundleError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder's lock; where another process has it, wait, or refuse.

    Windows has no such lock: there, nothing is held, and two writers are not kept apart.

    Raises:
        BundleError: another has it and ``wait`` is False; or the folder takes no lock.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{folder} could not be locked: {error}. Make it writable.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            raise BundleError(
                f"another export is writing {folder} (process {file.read().strip() or 'unknown'})."
                " Wait for it, or choose another folder."
            ) from error
        except OSError as error:
            raise BundleError(
                f"{folder} could not be locked: {error}. Use a disk that can lock files."
            ) from error
        if not wait:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield
