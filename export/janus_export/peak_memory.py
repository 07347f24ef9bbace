"""The most memory of its own that this process held while something ran."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
EVERY = 0.02  # seconds


class PeakMemory:
    """Watches anonymous memory: mapped files, weights among them, are not counted, the system can drop them.

    Linux says how much that is; elsewhere ``bytes`` stays None.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Start watching."""
        self._note()
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look a last time."""
        self._over.set()
        self._watch.join()
        self._note()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._note()

    def _note(self) -> None:
        if (now := anonymous()) is not None:
            self.bytes = max(self.bytes or 0, now)


def anonymous() -> int | None:
    """Return the bytes of anonymous memory that this process holds; None where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(sizes[0]) * 1024 if sizes else None
