"""The temporary folder of an incomplete export, and the record of its finished files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from janus_modular.atomic_writes import write_text
from janus_modular.foreign import sha256

STATE = "unfinished.json"


class ExportState:
    """A folder whose finished files are kept for the next export of the same source and settings."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Continue an interrupted export with this fingerprint; otherwise start with an empty folder."""
        self.folder = folder
        self.done: dict[str, str] = {}  # file -> hash, or what a file was written for -> its name
        self.fingerprint = json.loads(json.dumps(fingerprint))
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((folder / STATE).read_text("utf-8"))
            if state["fingerprint"] == self.fingerprint:
                self.done = state["done"]
        if self.done:
            self._remove_incomplete()
        else:
            _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, path: Path) -> bool:
        """Return True if a file is finished and unchanged since then."""
        return path.is_file() and self.done.get(path.name) == sha256(path)

    def note(self, name: str, value: str) -> None:
        """Record a file's hash, or another fact."""
        self.done[name] = value
        state = {"fingerprint": self.fingerprint, "done": self.done}
        write_text(self.folder / STATE, json.dumps(state))

    def _remove_incomplete(self) -> None:
        """Remove files that were being written, and lock files: the bundle would contain them."""
        complete = {STATE, *self.done, *self.done.values()}
        for path in self.folder.rglob("*"):
            if path.name not in complete and not path.is_dir():
                path.unlink()

    def close(self) -> None:
        """Remove the record: the folder is complete."""
        (self.folder / STATE).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Empty a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
