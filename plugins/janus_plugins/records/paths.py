"""Paths of several files in a text: braces, as shells expand them, and wildcards."""

from __future__ import annotations

import re
from glob import glob, has_magic
from hashlib import sha256
from pathlib import Path

from janus_modular import DataError, list_briefly

MAX_PATHS = 1_000_000
"""Most files that a text may name."""

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(text: str) -> list[str]:
    """Return the texts for which ``{0000..0009}`` and ``{a,b}`` in a text stand, in order.

    Raises:
        DataError: braces hold neither a range that rises nor a list, or stand for too many texts.
    """
    texts = [text]
    while match := BRACES.search(texts[0]):
        options = _options(match[1], text)
        if len(texts) * len(options) > MAX_PATHS:
            raise DataError(f"'{text}' stands for more than {MAX_PATHS:,} files; expected fewer.")
        texts = [
            before + option + after
            for before, _, after in (BRACES.split(text, maxsplit=1) for text in texts)
            for option in options
        ]
    return texts


def _options(inside: str, text: str) -> list[str]:
    if match := RANGE.fullmatch(inside):
        first, last = match.groups()
        if len(first) > 12 or len(last) > 12 or not 0 <= int(last) - int(first) < MAX_PATHS:
            raise DataError(
                f"'{text}' has the range {{{inside}}}; expected the lower number first, and at most"
                f" {MAX_PATHS:,} numbers."
            )
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise DataError(f"'{text}' has {{{inside}}}; expected a range, {{0000..0009}}, or a list, {{a,b}}.")
    return inside.split(",")


def expand_paths(text: str) -> list[Path]:
    """Return the files that a text with braces and wildcards (``*``, ``?``, ``[ab]``) stands for.

    Files are in the order of the braces; those of a wildcard are sorted by name.

    Raises:
        DataError: a file is missing, nothing matches, or a file is named twice.
    """
    paths: list[Path] = []
    missing = []
    for name in expand_braces(text):
        expanded = Path(name).expanduser()
        is_pattern = has_magic(name) and not expanded.exists()
        matches = sorted(map(Path, glob(str(expanded), recursive=True))) if is_pattern else [expanded]
        files = [path for path in matches if path.is_file()]
        paths += files
        if not files:
            missing.append(name)
    if missing:
        raise DataError(
            f"files that `path` names are missing: {list_briefly(missing)}. Expected all of them: complete"
            " the download, or correct `path`."
        )
    if len({*paths}) < len(paths):
        raise DataError(f"'{text}' names a file twice; expected each file once.")
    return paths


def digest_of_files(paths: list[Path], *, times: bool = False) -> str:
    """Return a digest of the names and sizes of files, with ``times`` also of when they were written."""
    digest = sha256()
    for path in paths:
        state = path.stat()
        time = state.st_mtime_ns if times else ""
        digest.update(f"{path.name}\0{state.st_size}\0{time}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
