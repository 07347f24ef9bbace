"""What trackers of experiment services share: a run that continues when it is resumed, and its settings."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from janus_modular import MissingExtraError, TrainingError, atomic_replace


def require(library: str) -> None:
    """Check that the library of a tracker is installed; its extra has the same name.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec(library) is None:
        raise MissingExtraError(f"the tracker '{library}'", library)


def stored_id(file: Path, folder: Path) -> str:
    """Return the id of the run in ``folder``, which is made once and kept in ``file``."""
    if file.exists():
        return file.read_text("utf-8").strip()
    run_id = f"{folder.absolute().name}-{secrets.token_hex(4)}"
    store_id(file, run_id)
    return run_id


def store_id(file: Path, run_id: str) -> None:
    """Write the id of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(file, error=TrainingError) as temporary:
        temporary.write_text(f"{run_id}\n", "utf-8")


def flat_settings(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a config's values by dotted keys; lists of mappings are numbered."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            flat |= flat_settings({str(number): item for number, item in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat
