"""Weight files of several processes, each with its chunks of the tensors.

They are safetensors files in the form of torch.distributed.checkpoint, whose ``HuggingFaceStorageReader``
reads them too: a header records the offset at which each chunk begins in its tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from janus_modular.errors import CheckpointError
from janus_modular.foreign import printable, reason

SHARDING = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
"""The names in a header under which torch.distributed.checkpoint stores where each chunk begins."""

NAME = re.compile(r"(.+)-rank-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in a file."""

    file: Any  # of safe_open
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def chunk_name(stem: str, rank: int, world: int) -> str:
    """Return the name of the file with the chunks of one process."""
    return f"{stem}-rank-{rank:05}-of-{world:05}.safetensors"


def is_chunk_file(name: str) -> bool:
    """Return True if a file of this name holds chunks of tensors."""
    return NAME.fullmatch(name) is not None


def sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the entries of a header that say where the chunks in its file begin, by the tensors' names."""
    sharding = {name: {OFFSETS: [*values]} for name, values in offsets.items()}
    return {SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0"}


def chunk_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the files of a folder that hold chunks of its weights, in the order of their processes.

    Those of its training state have another ``stem``.
    """
    return sorted(path for path in folder.glob(f"{stem}-rank-*.safetensors") if is_chunk_file(path.name))


def open_chunks(files: Sequence[Path]) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each tensor that joins its chunks; nothing is read before.

    Raises:
        CheckpointError: a file is missing or damaged, or the chunks of a tensor do not fill it.
    """
    names = {file.name for file in files}
    sets = {(match[1], int(match[3])) for match in map(NAME.fullmatch, names) if match}
    expected = {chunk_name(stem, rank, world) for stem, world in sets for rank in range(world)}
    if missing := sorted(expected - names):
        raise CheckpointError(
            f"{files[0].parent} lacks {len(missing)} of {len(expected)} files with chunks of its tensors:"
            f" {', '.join(missing[:3])}. Fetch them again."
        )
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for file in files:
        for name, chunk in _chunks_of(file).items():
            chunks[name].append(chunk)
    for name, of_tensor in chunks.items():
        _check_filled(name, of_tensor)
    return {name: partial(_join, name, of_tensor) for name, of_tensor in chunks.items()}


def _chunks_of(path: Path) -> dict[str, Chunk]:
    try:
        file: Any = safe_open(path, framework="pt")
        sharding = json.loads((file.metadata() or {})[SHARDING])
        return {
            name: Chunk(
                file, tuple(map(int, sharding[name][OFFSETS])), tuple(file.get_slice(name).get_shape())
            )
            for name in file.keys()  # noqa: SIM118  # no mapping
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}. Fetch it again.") from error


def _shape(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    ends = [[o + n for o, n in zip(chunk.offsets, chunk.shape, strict=True)] for chunk in chunks]
    return tuple(map(max, zip(*ends, strict=True)))


def _check_filled(name: str, chunks: Sequence[Chunk]) -> None:
    same = len({(len(chunk.offsets), len(chunk.shape)) for chunk in chunks}) == 1
    if not same or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(_shape(chunks)):
        raise CheckpointError(
            f"the chunks of '{printable(name)}' do not fill it: expected those of a single checkpoint."
            " Fetch it again."
        )


def _join(name: str, chunks: Sequence[Chunk]) -> Tensor:
    first = chunks[0].file.get_tensor(name)
    if len(chunks) == 1:
        return first
    whole = torch.empty(_shape(chunks), dtype=first.dtype)
    for chunk in chunks:
        target = whole
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.shape, strict=True)):
            target = target.narrow(dim, offset, size)
        target.copy_(chunk.file.get_tensor(name))
    return whole
