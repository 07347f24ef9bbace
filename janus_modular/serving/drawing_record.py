"""What a journal has of one drawing: a file to which lines are appended.

The first line is the request. Then comes a line for each code as it is drawn, ``[image, code]``, and at the
end ``"done"``. A line ``{"model": ...}`` begins the drawing anew. One call of the system writes a line,
and keeps it though the process is killed; a line that was cut off is not read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_modular import arguments
from janus_modular.errors import JournalError
from janus_modular.foreign import reason
from janus_modular.serving.requests import DrawRequest

DONE = "done"

log = logging.getLogger(__name__)


class DrawingRecord:
    """The request of a drawing, and the codes of its images so far. Used by one thread at a time."""

    def __init__(self, file: Path, request_id: str, request: DrawRequest, model: str | None) -> None:
        """Describe a drawing of which nothing is written yet; ``model``: a fingerprint, None: unknown."""
        self.file, self.request_id, self.request, self.model = file, request_id, request, model
        self.codes: dict[int, list[Any]] = {}  # of each image, as far as they are on disk
        self.is_done = False
        self.was_read = False  # from disk: another engine, or another request, began it
        self.is_broken = False  # a line could not be written; the drawing goes on without the journal

    @classmethod
    def read(cls, file: Path) -> DrawingRecord:
        """Read a record; a last line that is not complete is cut off.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged.
        """
        content = file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(file, end)
        try:
            first, *lines = [json.loads(line) for line in content[:end].splitlines()]
            settings = first["request"]
            if settings["size"] is not None:
                settings["size"] = tuple(settings["size"])
            settings["images"] = [b64decode(file) for file in settings.get("images", ())]
            request = DrawRequest(**settings, request_id=first["id"])
            record = cls(file, first["id"], request, first.get("model"))
            for line in lines:
                record._take(line)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{error!r:.100}") from error
        record.was_read = True
        return record

    def _take(self, line: Any) -> None:
        """Take a line after the first."""
        if isinstance(line, Mapping):
            self.model, self.is_done = line["model"], False
            self.codes.clear()
        elif line == DONE:
            self.is_done = True
        else:
            image, code = line
            if not (_is_code(image) and (_is_code(code) or (code and all(map(_is_code, code))))):
                raise ValueError(f"found the line {line!r:.60}")
            self.codes.setdefault(image, []).append(code)

    @property
    def count(self) -> int:
        """The codes of all images that are on disk."""
        return sum(map(len, self.codes.values()))

    def create(self) -> None:
        """Write the request, to a new file.

        Raises:
            JournalError: it cannot be written; there is no file.
        """
        line = {"id": self.request_id, "model": self.model, "request": plain(self.request)}
        try:
            self.file.touch(exist_ok=False)
            self._write(line)
        except OSError as error:
            self.discard()
            raise JournalError(
                f"the journal's file {self.file} cannot be written: {reason(error)}. Free some space, or open"
                " the engine without a journal."
            ) from error

    def restart(self, model: str | None) -> None:
        """Forget the codes; ``model`` draws them anew."""
        self.model, self.is_done = model, False
        self.codes.clear()
        self._append({"model": model})

    def add(self, image: int, code: Any) -> None:
        """Append the next code of an image."""
        self._append([image, np.asarray(code).tolist()])

    def finish(self) -> None:
        """Note that the drawing is done; a file that lacks codes is removed."""
        if not self.is_done:
            self._append(DONE)
            self.is_done = True
        if self.is_broken:
            self.discard()

    def discard(self) -> None:
        """Forget the request: it was cancelled, or it failed."""
        with suppress(OSError):
            self.file.unlink()

    def _append(self, line: Any) -> None:
        """Append a line, unless that failed before: the drawing then goes on, and is not recorded anymore."""
        if self.is_broken:
            return
        try:
            self._write(line)
        except OSError as error:
            self.is_broken = True
            log.warning(
                "the journal's file %s cannot be written: %s. The drawing goes on; after a crash it would be"
                " drawn again from the codes that the file has.",
                self.file,
                reason(error),
            )

    def _write(self, line: Any) -> None:
        """Write a line at once, or nothing of it."""
        data = json.dumps(line).encode() + b"\n"
        with self.file.open("r+b", buffering=0) as file:  # which must exist
            end = file.seek(0, os.SEEK_END)
            written = 0
            try:
                written = file.write(data) or 0
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):  # what is left of the line is not read
                    file.truncate(end)
                raise


def _is_code(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _png(image: Image.Image) -> str:
    """Return an image's pixels as a file in base64."""
    file = BytesIO()
    image.save(file, "PNG")
    return b64encode(file.getvalue()).decode("ascii")


def plain(request: DrawRequest) -> dict[str, Any]:
    """Return what determines a request's images, as JSON has it."""
    fields = asdict(replace(request, deadline=None, request_id=None, partial_images=0, images=()))
    del fields["deadline"], fields["request_id"], fields["partial_images"]
    fields["images"] = [_png(image) for image in arguments.opened_images(request.images)]
    result: dict[str, Any] = json.loads(json.dumps(fields, default=lambda value: np.asarray(value).tolist()))
    return result
