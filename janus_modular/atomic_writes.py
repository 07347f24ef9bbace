"""Atomic writes of files and folders: under a temporary path that is then renamed.

All temporary paths are hidden siblings of the target (``.NAME.janus-new``, ``-old`` and ``-gone``),
guarded by the lock ``.NAME.janus-lock``. Their names follow from ``NAME``, so that the next write of the same
target removes the remains of a killed one; the lock keeps it from removing those of a running one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from janus_modular.errors import JanusError
from janus_modular.locking import locked

PREFIX = "janus-"
"""The beginning of every temporary path's last suffix."""

TEMPORARY = re.compile(rf"\.(.+)\.{PREFIX}(?:new|old|gone|lock)$")


@contextmanager
def atomic_replace(file: Path, *, error: type[JanusError] = JanusError) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, what was written there becomes ``file``.

    A second writer waits for the first. On any error ``file`` stays as it was.

    Raises:
        OSError: the file or folder cannot be written.
        JanusError: (an ``error``) the lock file cannot be created or locked.
    """
    with locked(temporary_path(file, "lock"), file, wait=True, error=error):
        temporary = temporary_path(file, "new")
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, file)
        finally:
            with suppress(OSError):  # a read-only folder: the first error says so
                temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file (UTF-8, lines end in a line feed) atomically.

    Raises:
        OSError: the file or folder cannot be written.
    """
    with atomic_replace(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_replace_folder(folder: Path, *, error: type[JanusError]) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends well, it takes the place of ``folder``.

    The remains of killed writers are restored or removed first. On any error ``folder`` stays as it was, and
    no temporary file remains.

    Raises:
        OSError: the file or folder cannot be written.
        JanusError: (an ``error``) another process is writing ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, error=error):
        restore(folder)
        temporary = temporary_path(folder, "new")
        temporary.mkdir()
        try:
            yield temporary
            swap(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def folder_lock(folder: Path, *, error: type[JanusError]) -> AbstractContextManager[None]:
    """Return the lock for replacing ``folder``; the lock file is in the folder's parent, which must exist."""
    return locked(temporary_path(folder, "lock"), folder, error=error)


def restore(folder: Path) -> None:
    """Rename the old content back if a writer of ``folder`` was killed; remove the writer's temporary paths.

    Call it under the folder's lock.
    """
    old = temporary_path(folder, "old")
    if old.exists():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():  # killed between the two renames of `swap`
            old.rename(folder)
    for remains in (old, temporary_path(folder, "new"), temporary_path(folder, "gone")):
        _remove(remains)


def restore_all(parent: Path, *, error: type[JanusError]) -> None:
    """Call `restore` for everything in the folder ``parent`` that a killed writer was writing.

    Raises:
        OSError: a temporary path cannot be removed.
        JanusError: (an ``error``) another process is writing there.
    """
    for name in {match[1] for path in parent.glob(f".*.{PREFIX}*") if (match := TEMPORARY.match(path.name))}:
        with folder_lock(parent / name, error=error):
            restore(parent / name)


def refuse_interrupted(folder: Path, *, error: type[JanusError]) -> None:
    """Raise an error where a writer has moved the old folder away and not put the new one in its place.

    Readers hold no lock, and not every file system can exchange folders in a single step. The next write
    restores the folder.

    Raises:
        JanusError: (an ``error``) `swap` was killed between its two renames, or is just between them.
    """
    old = temporary_path(folder, "old") if folder.name else folder
    if os.path.lexists(old) and not os.path.lexists(folder):
        raise error(
            f"{folder} is missing: a replacement is running or was interrupted. Run the command that writes"
            f" it again; until then, the previous folder is {old}"
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed first, so that a killed removal leaves no half of it under its name."""
    gone = temporary_path(folder, "gone")
    _remove(gone)
    folder.rename(gone)
    _remove(gone)


def swap(new: Path, folder: Path) -> None:
    """Put the folder ``new``, synced to disk, in the place of ``folder``, and remove the old one.

    If the process is killed, the next `restore` gives the old content or the new. Call it under the folder's
    lock.
    """
    for path in (*new.rglob("*"), new):
        if not path.is_symlink():
            sync(path)
    old = temporary_path(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    if old.exists():
        gone = temporary_path(folder, "gone")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)  # the next writer removes the rest


def temporary_path(path: Path, purpose: str) -> Path:
    """Return the hidden sibling of ``path`` for a purpose: ``new``, ``old``, ``gone`` or ``lock``."""
    return path.with_name(f".{path.name}.{PREFIX}{purpose}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync a path to disk, so that no rename reaches the disk before the data."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
