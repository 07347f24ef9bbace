"""Writes and verifies ``SHA256SUMS``, a checkpoint's hashes of its files, as ``sha256sum --check`` reads it.

The model card is not hashed, so that it may be edited.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from janus_modular.errors import CheckpointError
from janus_modular.foreign import sha256

FILE = "SHA256SUMS"
UNCHECKED = {FILE, "README.md"}
LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\n]+)\n")


class HashingFile:
    """A file that is hashed as it is written, from its start to its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, and hash them."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def __enter__(self) -> HashingFile:
        """Return the file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def hexdigest(self) -> str:
        """Return the hash of all bytes written."""
        return self._digest.hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the hashes of a checkpoint's files; files whose hash is ``known`` are not read again."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in UNCHECKED)
    record(folder, {name: known.get(name) or sha256(folder / name) for name in names})


def record(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write hashes by the names of files as the record of ``folder``."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    (folder / FILE).write_text("".join(lines), "utf-8", newline="\n")


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the recorded hash of each file.

    Raises:
        CheckpointError: there is no record, or it is malformed.
    """
    path = folder / FILE
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {FILE}, so its files cannot be verified.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    lines = text.splitlines(keepends=True)
    matches = [LINE.fullmatch(line) for line in lines]
    for number, match in enumerate(matches, 1):
        if match is None:
            raise CheckpointError(
                f"{path}, line {number} is malformed: expected a hash of 64 digits, two spaces and a name."
            )
    return {match[2]: match[1] for match in matches if match is not None}


def verify_checksums(
    folder: Path,
    *,
    is_checkpoint_file: Callable[[str], bool],
    on_progress: Callable[[str], None] = lambda _: None,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Hash the files of a checkpoint; return the names of all that are recorded.

    Args:
        folder: the checkpoint's.
        is_checkpoint_file: returns True for the name of a checkpoint's file; other files are the user's.
        on_progress: is called with the name of each file before it is read.
        share: (2, 8) hashes every eighth file from number 2 on; that all are there is verified in any case.

    Raises:
        CheckpointError: a file is missing, was changed, or is not in the record; or there is no record.
    """
    recorded = read_checksums(folder)
    present = {
        path.name for path in folder.iterdir() if path.is_file() and is_checkpoint_file(path.name)
    } - UNCHECKED
    if unknown := sorted(present - set(recorded)):
        raise CheckpointError(f"{folder / unknown[0]} is not in {FILE}: it was added or renamed.")
    for number, (name, digest) in enumerate(recorded.items()):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; {FILE} names it.")
        if number % share[1] != share[0]:
            continue
        on_progress(name)
        if sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} was changed or damaged: its hash is not that in {FILE}.")
    return list(recorded)
