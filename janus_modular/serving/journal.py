"""A journal of drawings: after a crash, an engine goes on with the drawings that were not done.

Each request has a file of its own, a `janus_modular.serving.drawing_record.DrawingRecord`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock

from janus_modular.errors import JournalError, PromptError
from janus_modular.foreign import reason
from janus_modular.locking import locked
from janus_modular.serving.drawing_record import DrawingRecord, plain
from janus_modular.serving.requests import AnswerRequest, DrawRequest

MOST_DONE = 1000
"""Files of finished drawings that are kept, so that a client can ask for the same image again."""

MOST_BYTES = 64_000_000
"""Of all files of finished drawings."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that removed files end."""

log = logging.getLogger(__name__)


class Journal:
    """A folder with a file for each drawing. One engine at a time uses it, from any thread.

    Files of finished drawings are removed, the oldest first, once there are too many or a disk is full. Those
    of others are as many as an engine's rows and queue hold.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        *,
        most_done: int = MOST_DONE,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Open a folder, which is made if there is none; ``model``: a fingerprint, None: unknown.

        Raises:
            JournalError: the folder cannot be written, or another engine uses it.
        """
        self.folder, self.model = Path(folder).expanduser(), model
        self.most_done, self.most_bytes = most_done, most_bytes
        self._done: dict[Path, int] = {}  # bytes of finished drawings' files, the oldest first
        self._lock = Lock()
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
            JournalError: the record cannot be read or written; nothing is left of a new one.
        """
        file = self.folder / f"{sha256(request_id.encode()).hexdigest()[:32]}.jsonl"
        with self._lock:
            if file.exists() and (record := self._read(file)) is not None:
                self.check_same(record.request, request)
                self._done.pop(file, None)  # so that it is not removed meanwhile
                return record
            record = DrawingRecord(file, request_id, request, self.model)
            try:
                record.create()
            except JournalError as error:
                is_full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
                if not (is_full and self._done):
                    raise
                self._prune(0)
                record.create()
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

    def finish(self, record: DrawingRecord) -> None:
        """Note that a drawing is done; remove the oldest files if there are too many."""
        record.finish()
        with self._lock, suppress(OSError):  # it could not be written, or the file was removed
            self._done[record.file] = record.file.stat().st_size
            self._prune(self.most_done)

    def open_records(self) -> list[DrawingRecord]:
        """Return the records of drawings that are not done, oldest first; remove old ones that are.

        A file that is damaged, by a crash of the machine for instance, is renamed, and logged.

        Raises:
            JournalError: a file cannot be read; the folder is free again.
        """
        try:
            with self._lock:
                return [*self._open_records()]
        except JournalError:
            self.close()
            raise

    def _open_records(self) -> Iterator[DrawingRecord]:
        files = sorted(self.folder.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        for file in files:
            if not file.read_bytes().count(b"\n"):  # killed before the request was accepted
                file.unlink()
            elif (record := self._read(file)) is not None and record.is_done:
                self._done[file] = file.stat().st_size
            elif record is not None:
                yield record
        self._prune(self.most_done)

    def _read(self, file: Path) -> DrawingRecord | None:
        """Read a record; None: it was damaged, and is no record anymore.

        Raises:
            JournalError: the file cannot be read.
        """
        try:
            return DrawingRecord.read(file)
        except ValueError as error:
            renamed = file.with_suffix(".damaged")
            log.error(
                "the journal's file %s is damaged: %s; expected lines of JSON, the request first. It is %s"
                " now, and its drawing does not go on: a client that sends the request again gets the image.",
                file,
                error,
                renamed.name,
            )
            try:
                file.replace(renamed)
            except OSError as renaming:
                raise JournalError(f"{file} is damaged and cannot be renamed: {reason(renaming)}.") from error
            return None
        except OSError as error:
            raise JournalError(f"the journal's file {file} cannot be read: {reason(error)}.") from error

    def _prune(self, most: int) -> None:
        """Remove the oldest files of finished drawings, until there are few and small enough."""
        total = sum(self._done.values())
        while len(self._done) > most or total > self.most_bytes:
            file = next(iter(self._done))
            total -= self._done.pop(file)
            with suppress(OSError):
                file.unlink()

    def close(self) -> None:
        """Release the folder, so that another engine can use it."""
        self._held.close()
