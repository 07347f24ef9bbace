"""Reading what others wrote: files are bounded before they are read, and libraries' exceptions become ours.

Every place that reads foreign input (weights, configs, tokenizers, templates, images) goes through
`foreign_errors`, because nobody can list what a parser raises over damaged bytes. Bugs of our own stay
tracebacks: only the call into the parser, and what interprets its result, stands inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_modular.errors import JanusError, escaped

MAX_JSON_BYTES = 256 * 2**20
"""Larger text files are refused unread; the largest tokenizer.json in use has about 35 MB."""

MAX_DEPTH = 64
"""Levels of nesting that a JSON or YAML file may have: whatever walks or copies its content recurses."""


@contextmanager
def foreign_errors(what: object, error: type[JanusError], hint: str = "Fetch it again.") -> Iterator[None]:
    """Turn whatever is raised inside into ``error``: ``WHAT cannot be read: REASON. HINT``.

    Errors of ours pass as they are, and so do interrupts and exits. A panic of a library in Rust is no
    `Exception` in Python, but it is a failure to read all the same.

    Args:
        what: what is read, usually a path; it begins the message.
        error: the class to raise.
        hint: what the user can do.

    Raises:
        JanusError: the body raised; of class ``error`` unless it was ours before.
    """
    try:
        yield
    except JanusError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__module__ != "pyo3_runtime":
            raise
        raise error(f"{printable(what)} cannot be read: {reason(cause)}. {hint}".rstrip()) from cause


@contextmanager
def name_in_errors(what: object) -> Iterator[None]:
    """Put ``what`` before the text of our errors that do not mention it: readers look for the file.

    Raises:
        JanusError: the body raised it; its class and attributes stay.
    """
    try:
        yield
    except JanusError as error:
        if str(what) not in str(error):
            error.args = (f"{printable(what)}: {error}", *error.args[1:])
        raise


def reason(error: BaseException) -> str:
    """Return in a line what an exception says; its class too, unless the words are enough."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError) and error.args:
        return f"it lacks {error.args[0]!r}"
    text = printable(" ".join(str(error).split()), most=400).rstrip(".")
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: object, most: int = 400) -> str:
    """Return a text that any terminal takes, shortened: control characters and surrogates are escaped."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return escaped(text)


def path_exists(path: str | Path) -> bool:
    """Return True if a file or folder is there; no name that none can have (too long, NUL in it) is."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def is_hub_id(text: str) -> bool:
    """Return True if a text reads like ``owner/name`` or ``owner/name/file`` on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(/[\w.-]+)*", text))


def read_text(path: Path, error: type[JanusError], *, most: int = MAX_JSON_BYTES) -> str:
    """Return the text of a regular file of at most ``most`` bytes of UTF-8.

    Raises:
        JanusError: of class ``error``; there is no such file, it is a device or a folder, it is too large,
            or it is not UTF-8.
    """
    with foreign_errors(path, error, "Expected a text file in UTF-8; check the path, or fetch it again."):
        if not path.exists():
            raise error(f"there is no file {printable(path)}. Check the path, or fetch it again.")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a device or a pipe"
            raise error(f"{printable(path)} is {found}; expected a regular file. Check the path.")
        if (size := path.stat().st_size) > most:
            raise error(
                f"{printable(path)} has {size:,} bytes; at most {most:,} are read as text. Check the path."
            )
        return path.read_text("utf-8")


def read_json(path: Path, error: type[JanusError]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        JanusError: of class ``error``; the file cannot be read, is not JSON, holds something else than an
            object, or is nested deeper than `MAX_DEPTH`.
    """
    text = read_text(path, error)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as cause:  # also whole numbers of thousands of digits
        raise error(f"{printable(path)} cannot be read as JSON: {reason(cause)}. Fetch it again.") from cause
    if not isinstance(content, dict):
        raise error(f"{printable(path)} holds a {type(content).__name__}; expected a JSON object.")
    if depth_exceeds(content):
        raise error(f"{printable(path)} is nested too deeply: expected at most {MAX_DEPTH} levels.")
    return content


def depth_exceeds(content: object, most: int = MAX_DEPTH) -> bool:
    """Return True if mappings and lists lie more than ``most`` deep in each other."""
    level = [content]
    for _ in range(most + 1):
        if not level:
            return False
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
