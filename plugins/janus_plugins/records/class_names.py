"""Files of the names of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from janus_modular import DataError


def read_names(path: Path) -> dict[str, Any]:
    """Return names by class: from JSON, or from lines of a class, white space, and a name.

    Raises:
        DataError: the file is missing, or of another form.
    """
    try:
        text = path.read_text("utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise DataError(f"the names of classes in '{path}' cannot be read: {error}.") from error
    if path.suffix == ".json":
        if not isinstance(names, dict):
            raise DataError(
                f"'{path}' holds a {type(names).__name__}; expected a JSON object: {{CLASS: NAME}}."
            )
        return names
    names = {}
    for number, line in enumerate(text.splitlines(), 1):
        label, _, name = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
        if line.strip() and not name.strip():
            raise DataError(f"'{path}', line {number}: found {line.strip()!r:.100}; expected CLASS NAME.")
        if label in names:
            raise DataError(f"'{path}', line {number}: the class {label} is there twice; expected once.")
        if label:
            names[label] = name.strip()
    return names
