"""Writes that are whole or not at all: under a temporary path, then renamed.

All temporary paths are hidden siblings of what is written (``.NAME.janus-new``, ``-old`` and ``-gone``),
guarded by the lock ``.NAME.janus-lock``. Their names follow from ``NAME``, so that the next write of the same
file or folder removes what a killed one has left, and the lock keeps it from removing what is being written.
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
"""Begins the last suffix of every temporary path."""

LEFT = re.compile(rf"\.(.+)\.{PREFIX}(?:new|old|gone|lock)$")


@contextmanager
def atomic_replace(file: Path, *, error: type[JanusError] = JanusError) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, what was written there becomes ``file``.

    A second writer waits for the first. On any error ``file`` stays as it was.

    Raises:
        OSError: the disk did not take it.
        JanusError: (an ``error``) the folder cannot be locked.
    """
    with locked(temporary_path(file, "lock"), file, wait=True, error=error):
        temporary = temporary_path(file, "new")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, file)
        finally:
            with suppress(OSError):  # a read-only folder, which the error at hand speaks of
                temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file (UTF-8, lines end in a line feed) whole or not at all.

    Raises:
        OSError: the disk did not take it.
    """
    with atomic_replace(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_replace_folder(folder: Path, *, error: type[JanusError]) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends well, it takes the place of ``folder``.

    What killed writers have left is restored or removed before. On any error ``folder`` stays as it was, and
    nothing else is left behind.

    Raises:
        OSError: the disk did not take it.
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
    """Return the lock of whoever replaces ``folder``; it lies beside the folder, which must have a parent."""
    return locked(temporary_path(folder, "lock"), folder, error=error)


def restore(folder: Path) -> None:
    """Bring back what a writer of ``folder`` had put away when it was killed, and remove what it has left.

    To be called under the lock of the folder.
    """
    old = temporary_path(folder, "old")
    if old.exists():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():  # killed between the two renames of `swap`
            old.rename(folder)
    for left in (old, temporary_path(folder, "new"), temporary_path(folder, "gone")):
        _remove(left)


def restore_all(parent: Path, *, error: type[JanusError]) -> None:
    """Restore or remove what killed writers have left of anything in the folder ``parent``.

    Raises:
        OSError: it cannot be removed.
        JanusError: (an ``error``) another process is writing there.
    """
    for name in {match[1] for path in parent.glob(f".*.{PREFIX}*") if (match := LEFT.match(path.name))}:
        with folder_lock(parent / name, error=error):
            restore(parent / name)


def refuse_interrupted(folder: Path, *, error: type[JanusError]) -> None:
    """Refuse to read a folder that a writer has put away and not replaced; only the next write restores it.

    A reader holds no lock, and a folder cannot be exchanged for another in a single step everywhere.

    Raises:
        JanusError: (an ``error``) `swap` was killed between its two renames, or is just between them.
    """
    old = temporary_path(folder, "old") if folder.name else folder
    if os.path.lexists(old) and not os.path.lexists(folder):
        raise error(
            f"{folder} is not there: it is being replaced, or that was interrupted. Run the command that"
            f" writes it again; until then, what was there before is in {old}"
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder so that, when this is killed, no half of it is taken for the whole."""
    gone = temporary_path(folder, "gone")
    _remove(gone)
    folder.rename(gone)
    _remove(gone)


def swap(new: Path, folder: Path) -> None:
    """Put the folder ``new`` in the place of ``folder``, on disk before it is renamed; remove the old one.

    Killed at any point, the next `restore` leads to the old content or to the new one. To be called under
    the lock of the folder.
    """
    for path in (*new.rglob("*"), new):
        if not path.is_symlink():
            _sync(path)
    old = temporary_path(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    if old.exists():
        gone = temporary_path(folder, "gone")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)  # what stays is removed by the next writer


def temporary_path(path: Path, purpose: str) -> Path:
    """Return the hidden sibling of ``path`` for a purpose: ``new``, ``old``, ``gone`` or ``lock``."""
    return path.with_name(f".{path.name}.{PREFIX}{purpose}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never outlives the data."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
