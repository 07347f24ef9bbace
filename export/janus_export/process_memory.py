"""The memory of a process: how much it takes, and when freed blocks go back to the system. Linux alone."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

EVERY = 0.02  # seconds
M_MMAP_THRESHOLD = -3  # mallopt's name for it, in glibc's malloc.h
MMAP_THRESHOLD = 2**20  # bytes


def peak_memory(pid: int | str = "self") -> int | None:
    """Return the most memory that a process ever had, in bytes, mapped files included; None off Linux."""
    return _status("VmHWM", pid)


def anonymous_memory(pid: int | str = "self") -> int | None:
    """Return what a process holds that is no mapped file, in bytes; None off Linux, or where it has ended."""
    return _status("RssAnon", pid)


def fix_mmap_threshold() -> None:
    """Have glibc map each block of 1 MiB or more, which gives it back to the system when it is freed.

    By itself glibc raises the threshold to the size of a block that was freed, up to 32 MiB, and then keeps
    such blocks in a heap whose holes it cannot give back (mallopt(3), M_MMAP_THRESHOLD). The setting is for
    the whole process, from now on; another C library has no such threshold, and nothing is set.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


class AnonymousPeak:
    """Notes the most anonymous memory that this process held while something ran, in ``bytes``.

    Mapped files, weights among them, are not counted: the system can drop them.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        """Start watching."""
        self._note()
        self._watch.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look a last time."""
        self._over.set()
        self._watch.join()
        self._note()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._note()

    def _note(self) -> None:
        if (now := anonymous_memory()) is not None:
            self.bytes = max(self.bytes or 0, now)


def _status(field: str, pid: int | str) -> int | None:
    try:
        text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")  # a process' name may be anything
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
