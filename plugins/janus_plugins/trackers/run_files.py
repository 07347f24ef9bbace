"""Checks names of files and folders that a tracker writes in the folder of a run."""

from __future__ import annotations

from pathlib import Path

RESERVED = (".lock", "checkpoints", "model", "non_finite", "validation")
"""What a run itself writes in its folder."""

MAX_BYTES = 255
"""Of a name, in common file systems."""


def check_run_file(key: str, name: str) -> None:
    """Check the option ``key``: a relative path in the run's folder, apart from what the run writes itself.

    Raises:
        ValueError: it is empty, leaves the folder, is too long, or belongs to the run.
    """
    path = Path(name.strip())
    problem = ""
    if not path.parts:
        problem = "which names nothing"
    elif path.is_absolute() or ".." in path.parts:
        problem = "which lies outside of the run's folder"
    elif path.parts[0].casefold() in RESERVED or path.parts[0].startswith(".janus-modular"):
        problem = f"but the run itself writes '{path.parts[0]}'"
    elif any(len(part.encode()) > MAX_BYTES for part in path.parts):
        problem = f"which is longer than {MAX_BYTES} bytes"
    if problem:
        raise ValueError(
            f"{key}: found {name!r:.80}, {problem}; expected another name in the run's folder than"
            f" {', '.join(RESERVED)}."
        )
