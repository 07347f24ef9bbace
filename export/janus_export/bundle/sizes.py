"""Sizes in bytes: of a bundle's variants and graphs, and of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from janus_export.bundle.external_data import references
from janus_modular.foreign import printable

if TYPE_CHECKING:
    from janus_export.bundle.bundle import Bundle

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MOST_BYTES = 2**60
"""Largest limit of a file size; no file system stores larger files."""

CHECKPOINT_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Suffixes of weight files; only files of the first suffix that occurs count, as the others are copies."""


@dataclass(frozen=True)
class VariantSize:
    """The size of a variant on disk, in bytes; files that graphs share are counted once."""

    variant: str
    total: int  # graphs, weights, and the files that every variant needs (tokenizer, processor)
    weights: int
    graphs: dict[str, int]  # by graph: its file and its weights

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return asdict(self)


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as ``2GB`` or ``1.5 GiB`` stands for.

    Raises:
        ValueError: the unit is missing or unknown, or the size is not from 1 to `MOST_BYTES` bytes.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip(), re.ASCII)
    size = float(parts[1]) * UNITS.get(parts[2], 0) if parts else 0.0
    if not 1 <= size <= MOST_BYTES:
        raise ValueError(
            f"'{printable(text, 60)}'; expected a positive number and a unit of {', '.join(UNITS)} (2GB),"
            f" and {MOST_BYTES // 2**30:,} GiB at most"
        )
    return int(size)


def variant_size(bundle: Bundle, variant: str) -> VariantSize:
    """Return the size of a variant; files that only other variants need are not counted."""
    files, sizes = bundle.manifest["variants"][variant]["files"], bundle.manifest["bytes"]
    needed = {
        file: {reference.location for reference in references(bundle.folder / file)}
        for file in files.values()
    }
    weights = set[str]().union(*needed.values())
    return VariantSize(
        variant,
        total=_sum(sizes, {*files.values(), *weights, *common_files(bundle.manifest)}),
        weights=_sum(sizes, weights),
        graphs={name: _sum(sizes, {file, *needed[file]}) for name, file in files.items()},
    )


def common_files(manifest: Mapping[str, Any]) -> set[str]:
    """Return the files that every variant needs: those that no variant lists."""
    records = manifest["variants"].values()
    listed = {name for record in records for name in (*record["files"].values(), *record["weights"])}
    return set(manifest["bytes"]) - listed


def checkpoint_bytes(manifest: Mapping[str, Any]) -> int | None:
    """Return the size of the checkpoint's weights; None if the manifest records none."""
    files = manifest["source"]["files"]
    for suffix in CHECKPOINT_WEIGHTS:
        weight_bytes = [size for name, (size, _) in files.items() if PurePath(name).suffix == suffix]
        if weight_bytes:
            return sum(weight_bytes)
    return None


def _sum(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in set(names))
