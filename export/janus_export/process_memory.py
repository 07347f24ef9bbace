"""How much memory a process takes, as Linux says it; elsewhere nothing is known, and None is said."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

EVERY = 0.02  # seconds


def peak_memory(pid: int | str = "self") -> int | None:
    """Return the most memory that a process ever had, in bytes, mapped files included; None off Linux."""
    return _status("VmHWM", pid)


def anonymous_memory(pid: int | str = "self") -> int | None:
    """Return what a process holds that is no mapped file, in bytes; None off Linux, or where it has ended."""
    return _status("RssAnon", pid)


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
