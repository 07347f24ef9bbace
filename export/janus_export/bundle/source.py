"""The record of the checkpoint that a bundle was exported from, and how another one differs from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from janus_modular.errors import CheckpointError
from janus_modular.weights.checksums import FILE, read_checksums

WEIGHTS = (".safetensors", ".bin", ".pt")
"""Endings of files of weights."""


def describe_source(named: str, folder: Path) -> dict[str, Any]:
    """Return the record of a source checkpoint.

    Hashing its weights would be slow, so they are described by size and time, and by the hashes that the
    checkpoint records itself, if it has such a record in our form.
    """
    text = (folder / "config.json").read_bytes()
    source = {
        "path": named,
        "format": json.loads(text).get("model_type"),
        "config sha256": hashlib.sha256(text).hexdigest(),
        "files": _stamps(folder),
    }
    with suppress(CheckpointError):  # no record, or one of others, in another form
        recorded = read_checksums(folder)
        source["weights sha256"] = {name: hash_ for name, hash_ in recorded.items() if name.endswith(WEIGHTS)}
    return source


def difference(source: Mapping[str, Any], compared: Mapping[str, Any]) -> str | None:
    """Return what shows that two records are of different models; None: nothing does.

    The times of files say nothing, since a copy has others.
    """
    if source["config sha256"] != compared["config sha256"]:
        return "its config.json is another"
    sizes = [
        {name: size for name, (size, _) in record["files"].items() if name.endswith(WEIGHTS)}
        for record in (source, compared)
    ]
    if sizes[0] != sizes[1]:
        return "its files of weights have other names or sizes"
    hashes = [record.get("weights sha256") for record in (source, compared)]
    if None not in hashes and hashes[0] != hashes[1]:
        return f"its weights are others, by {FILE}"
    return None


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change (ns) of a folder's files."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
