"""Reads untrusted files: their size is bounded, and the exceptions of parsers become errors with a hint.

Every read of foreign input (weights, configs, tokenizers, templates, images) is inside `foreign_errors`,
because a parser may raise any exception over damaged bytes. Only the call of the parser and the use of its
result are inside, so that bugs elsewhere stay tracebacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_modular.errors import JanusError, escaped

MAX_JSON_BYTES = 256 * 2**20
"""Larger text files are an error, unread; the largest tokenizer.json in use has about 35 MB."""

OUTPUTS = "runs"
"""The folder that commands write to, here, unless they are given another."""

MAX_DEPTH = 64
"""Levels of nesting that a JSON or YAML file may have, since walking and copying it recurse."""


@contextmanager
def foreign_errors(subject: object, error: type[JanusError], hint: str = "Fetch it again.") -> Iterator[None]:
    """Turn whatever is raised inside into ``error``: ``SUBJECT cannot be read: REASON. HINT``.

    A `JanusError` passes unchanged, and so do interrupts and exits. A panic of a library in Rust, which is no
    `Exception` in Python, is turned into an error too.

    Args:
        subject: what is read, usually a path; the message begins with it.
        error: the class to raise.
        hint: what the user can do.

    Raises:
        JanusError: the body raised; of class ``error`` unless the body raised a JanusError.
    """
    try:
        yield
    except JanusError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__module__ != "pyo3_runtime":
            raise
        raise error(f"{printable(subject)} cannot be read: {reason(cause)}. {hint}".rstrip()) from cause


@contextmanager
def name_in_errors(subject: object) -> Iterator[None]:
    """Put ``subject``, a file for instance, before the text of errors that do not mention it.

    Raises:
        JanusError: the body raised it; class and attributes are unchanged.
    """
    try:
        yield
    except JanusError as error:
        if str(subject) not in str(error):
            error.args = (f"{printable(subject)}: {error}", *error.args[1:])
        raise


def reason(error: BaseException) -> str:
    """Return an exception's text on a line, with its class unless the text says enough."""
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
    """Return a text, shortened, with control characters and surrogates escaped."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return escaped(text)


def path_exists(path: str | Path) -> bool:
    """Return True if a file or folder exists; False for a path that none can have (too long, with NUL)."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def is_hub_id(text: str) -> bool:
    """Return True if a text has the form ``owner/name`` or ``owner/name/file`` of hub ids.

    A path below `OUTPUTS` is never one, so that what was not written yet is not looked up on the hub.
    """
    hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+(/[\w.-]+)*", text)
    return hub_id is not None and not text.startswith(f"{OUTPUTS}/")


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
            path_type = "a folder" if path.is_dir() else "a device or a pipe"
            raise error(f"{printable(path)} is {path_type}; expected a regular file. Check the path.")
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
    """Return True if mappings and lists are nested more than ``most`` levels deep."""
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
