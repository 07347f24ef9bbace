"""A journal of drawings: after a crash, an engine goes on with the drawings that were not done.

Each request has a file of its own, to which lines are appended: the request, each code as it is drawn, and at
the end ``"done"``. A line is written by one call of the system, which keeps it though the process is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from janus_modular.errors import JournalError, PromptError
from janus_modular.locking import locked
from janus_modular.serving.requests import AnswerRequest, DrawRequest

DONE = "done"
MOST_DONE = 1000
"""Files of finished drawings that are kept, so that a client can ask for the same image again."""


class Journal:
    """A folder with a file for each drawing. One engine at a time uses it."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder, which is made if there is none.

        Raises:
            JournalError: the folder cannot be written, or another engine uses it.
        """
        self.folder = Path(folder).expanduser()
        self._held = ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(
                f"the journal {self.folder} cannot be made: {error.strerror}. Choose a folder that can be"
                " written."
            ) from error
        self._held.enter_context(locked(self.folder / "lock", self.folder, error=JournalError))

    def begin(self, request_id: str, request: DrawRequest) -> DrawingRecord:
        """Return the record of a request: a new one, or that of the same request before.

        Raises:
            PromptError: the id belongs to another request.
            JournalError: the record cannot be read or written.
        """
        file = self.folder / f"{sha256(request_id.encode()).hexdigest()[:32]}.jsonl"
        line = {"id": request_id, "request": plain(request)}
        if not file.exists():
            record = DrawingRecord(file, request_id, request)
            record.write(line)
            return record
        record = self.read(file)
        self.check_same(record.request, request)
        return record

    def check_same(self, first: AnswerRequest | DrawRequest, second: AnswerRequest | DrawRequest) -> None:
        """Check that a request may have the id of another: that both draw the same images.

        Raises:
            PromptError: they differ.
        """
        drawings = isinstance(first, DrawRequest) and isinstance(second, DrawRequest)
        if not drawings or plain(first) != plain(second):  # type: ignore[arg-type]
            raise PromptError(
                f"request_id: found {second.request_id!r}, which another request has; expected the same"
                " drawing, with the same settings, or another id."
            )

    def read(self, file: Path) -> DrawingRecord:
        """Read the record of a request; a last line that is not complete is cut off.

        Raises:
            JournalError: the file is damaged.
        """
        try:
            content = file.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                os.truncate(file, end)
            first, *lines = [json.loads(line) for line in content[:end].splitlines()]
            settings = first["request"]
            if settings["size"] is not None:
                settings["size"] = tuple(settings["size"])
            record = DrawingRecord(file, first["id"], DrawRequest(**settings, request_id=first["id"]))
            record.is_done = DONE in lines
            for image, code in (line for line in lines if line != DONE):
                record.codes.setdefault(image, []).append(code)
        except OSError as error:
            raise JournalError(f"the journal's file {file} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"the journal's file {file} is damaged: {error!r:.100}; expected lines of JSON, the request"
                " first. Remove the file: its drawing is lost."
            ) from error
        return record

    def open_records(self) -> list[DrawingRecord]:
        """Return the records of drawings that are not done, oldest first; remove old ones that are.

        Raises:
            JournalError: a file is damaged; the folder is free again.
        """
        try:
            return [*self._open_records()]
        except JournalError:
            self.close()
            raise

    def _open_records(self) -> Iterator[DrawingRecord]:
        done = []
        files = sorted(self.folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        for file in files:
            if not file.read_bytes().count(b"\n"):  # killed before the request was accepted
                file.unlink()
            elif (record := self.read(file)).is_done:
                done.append(file)
            else:
                yield record
        for file in done[:-MOST_DONE]:
            file.unlink()

    def close(self) -> None:
        """Let another engine use the folder."""
        self._held.close()


class DrawingRecord:
    """What a journal has of a request. Used by one thread at a time."""

    def __init__(self, file: Path, request_id: str, request: DrawRequest) -> None:
        self.file, self.request_id, self.request = file, request_id, request
        self.codes: dict[int, list[Any]] = {}  # of each image, as far as they are on disk
        self.is_done = False

    def add(self, image: int, position: int, code: Any) -> None:
        """Append the code of an image at a position, or compare it with the one on disk.

        Raises:
            JournalError: the disk is full, or the codes on disk are not those that this model draws.
        """
        known = self.codes.setdefault(image, [])
        number = np.asarray(code).tolist()
        if position == len(known):
            self.write([image, number])
            known.append(number)
        elif known[position] != number:
            raise JournalError(
                f"the journal {self.file.name}: found the code {known[position]} at position {position} of"
                f" image {image}; this model draws {number}. Open the engine with the model that began it, or"
                " remove the file."
            )

    def finish(self) -> None:
        """Note that the drawing is done."""
        if not self.is_done:
            self.write(DONE)
            self.is_done = True

    def discard(self) -> None:
        """Forget the request: it was cancelled, or it failed."""
        with suppress(OSError):
            self.file.unlink()

    def write(self, line: Any) -> None:
        """Append a line at once.

        Raises:
            JournalError: it cannot be written; what was written of it is cut off.
        """
        data = json.dumps(line).encode() + b"\n"
        try:
            with self.file.open("ab", buffering=0) as file:
                if (written := file.write(data)) != len(data):
                    file.truncate(file.tell() - (written or 0))
                    raise OSError(0, "no space left on the device")
        except OSError as error:
            raise JournalError(
                f"the journal's file {self.file} cannot be written: {error.strerror}. Free some space, or"
                " open the engine without a journal."
            ) from error


def plain(request: DrawRequest) -> dict[str, Any]:
    """Return what determines a request's images, as JSON has it."""
    fields = asdict(replace(request, deadline=None, request_id=None, partial_images=0))
    del fields["deadline"], fields["request_id"], fields["partial_images"]
    result: dict[str, Any] = json.loads(json.dumps(fields, default=lambda value: np.asarray(value).tolist()))
    return result
