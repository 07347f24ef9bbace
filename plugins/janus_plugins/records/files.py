"""Files of JSON records, indexed without parsing: a JSON object a line, or a JSON array of objects."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import DataError

TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
"""A whole string of JSON, or a bracket: enough to follow the depth of nesting."""


class RecordFile:
    """The records of a file. Memory holds the start of each record: 8 bytes a record.

    The first character of a file, not its name, decides between lines and an array.
    """

    def __init__(self, path: Path) -> None:
        """Find the start of each record.

        Raises:
            DataError: the file is missing or empty, or an array with other items than objects.
        """
        self.path = path
        if not path.is_file():
            raise DataError(
                f"'{path}' is no file: set `path` to your own file, a JSON object a line or a JSON array."
            )
        if not path.stat().st_size:
            raise DataError(f"'{path}' is empty: expected a JSON object a line, or a JSON array.")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first = re.compile(rb"(?:\xef\xbb\xbf)?\s*").match(self._bytes)
        start = first.end() if first else 0
        self.is_array = self._bytes[start : start + 1] == b"["
        self.starts = self._array_starts(start) if self.is_array else _line_starts(self._bytes)  # (len,)

    def __len__(self) -> int:
        return len(self.starts)

    def __reduce__(self) -> tuple[type[RecordFile], tuple[Path]]:
        """Copy and pickle by opening the file again."""
        return RecordFile, (self.path,)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return a parsed record.

        Raises:
            DataError: the record is not a JSON object, or has a key twice.
        """
        raw = self._array_item(index) if self.is_array else self._line(index)
        hint = "Expected objects with commas between them, up to the ] of the array."
        if not self.is_array:
            hint = "A file that does not begin with [ is read as a JSON object a line."
        return parse_object(raw, hint)

    def line_number(self, index: int) -> int:
        """Return the number of the line, from 1, in which a record begins; for errors."""
        return self._bytes[: int(self.starts[index])].count(b"\n") + 1

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file, in hex."""
        return hashlib.sha256(self._bytes).hexdigest()

    def _line(self, index: int) -> bytes:
        start = int(self.starts[index])
        end = self._bytes.find(b"\n", start)
        return self._bytes[start : len(self._bytes) if end < 0 else end]

    def _array_item(self, index: int) -> bytes:
        last = index % len(self) == len(self) - 1
        end = len(self._bytes) if last else int(self.starts[index + 1])
        raw = self._bytes[int(self.starts[index]) : end].rstrip()
        separator = b"]" if last else b","
        if not raw.endswith(separator):
            raise DataError(f"not JSON: expected {separator.decode()} after an element of the array.")
        return raw[:-1]

    def _array_starts(self, start: int) -> NDArray[np.int64]:
        """Return where each element of the array at ``start`` begins."""
        starts, depth, end = array("q"), 0, -1
        for token in TOKEN.finditer(self._bytes, start):
            character = self._bytes[token.start()]
            if character == ord('"'):
                continue
            if end >= 0:
                break
            if character in b"{[":
                if depth == 1:
                    starts.append(token.start())
                depth += 1
            else:
                depth -= 1
                if depth == 0:
                    end = token.end()
        if end < 0:
            raise DataError(
                f"'{self.path}' begins as a JSON array without an end; expected ]. Was the file cut short?"
            )
        if self._bytes[end:].strip():
            line = self._bytes[:end].count(b"\n") + 1
            raise DataError(
                f"'{self.path}' continues after its JSON array ends in line {line}: expected one array of"
                " objects, or a JSON object a line."
            )
        if not starts or self._bytes[start + 1 : starts[0]].strip():
            raise DataError(f"'{self.path}' is a JSON array without objects: expected [{{...}}, ...].")
        return np.array(starts, np.int64)


def parse_object(raw: bytes, hint: str) -> Mapping[str, Any]:
    """Return a JSON object from its text in UTF-8; ``hint`` is added to the error of a parser.

    Raises:
        DataError: the text is not a JSON object, or has a key twice.
    """
    try:
        record = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {str(error) or 'nested too deeply'}. {hint}") from error
    if not isinstance(record, Mapping):
        raise DataError(f"a {type(record).__name__}; expected a JSON object.")
    return record


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; JSON parsers keep the last value of a repeated key without an error."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise DataError(f"the key '{repeated}' is there twice; expected each once.")
    return content


def _line_starts(content: mmap.mmap, chunk: int = 1 << 26) -> NDArray[np.int64]:
    """Return where each line that is not blank begins."""
    breaks = [
        np.flatnonzero(np.frombuffer(content[start : start + chunk], np.uint8) == ord("\n")) + start
        for start in range(0, len(content), chunk)
    ]
    ends = np.concatenate([*breaks, [len(content)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    short = np.flatnonzero(ends - starts < 8)  # only these can be blank
    blank = [i for i in short if not content[int(starts[i]) : int(ends[i])].strip()]
    return np.delete(starts, blank)
