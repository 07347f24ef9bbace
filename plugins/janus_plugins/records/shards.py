"""Tar archives whose members are grouped by key: ``0001.jpg`` and ``0001.txt`` are one sample.

An index has the position of each member, so that any sample is read without those before it.
"""

from __future__ import annotations

import logging
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from janus_modular import DataError, atomic_replace, list_briefly
from janus_plugins.records.paths import digest_of_files

log = logging.getLogger(__name__)

MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<suffix>[^/]+)", re.DOTALL)
"""A member's name: the key ends at the first dot after the last slash."""

BLOCK = 512
"""Bytes of a tar's blocks; two blocks of zeros end the archive."""


@dataclass(frozen=True)
class ShardIndex:
    """The positions of members; those of a group follow each other."""

    suffixes: NDArray[np.str_]  # all that occur
    suffix: NDArray[np.int32]  # (members,) index in ``suffixes``
    offset: NDArray[np.int64]  # (members,) of the content in the shard
    size: NDArray[np.int64]  # (members,)
    group_starts: NDArray[np.int64]  # (groups + 1,) the first member of each group
    shard_starts: NDArray[np.int64]  # (shards + 1,) the first group of each shard
    digest: NDArray[np.str_]  # () of the shards' names, sizes and times

    def __len__(self) -> int:
        return len(self.group_starts) - 1


@dataclass(frozen=True)
class Member:
    """A file in a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the content.

        Raises:
            DataError: the shard has become shorter since it was indexed.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise DataError(
                f"'{self.shard}' was cut short after it was indexed. Restore it, and start again."
            )
        return content

    def name(self) -> str:
        """Return the name, as far as the block before the content has it."""
        header = Member(self.shard, self.offset - BLOCK, BLOCK).read()
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name


class Shards:
    """The groups of several archives."""

    def __init__(self, paths: Sequence[Path], index: Path | None = None) -> None:
        """Read the index from the file ``index`` if it has that of these shards, else build and write it.

        Raises:
            DataError: a shard is not an uncompressed tar archive, cut short, or without groups; or the index
                cannot be written.
        """
        self.paths = list(paths)
        digest = digest_of_files(self.paths, times=True)
        stored = read_index(index, digest) if index else None
        self.index = build_index(self.paths, digest) if stored is None else stored
        if index and stored is None:
            write_index(self.index, index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Member]:
        """Return the members of a group by suffix, in lower case."""
        shard = self.paths[int(np.searchsorted(self.index.shard_starts, number, "right")) - 1]
        first, last = self.index.group_starts[number : number + 2].tolist()
        return {
            str(self.index.suffixes[self.index.suffix[i]]): Member(
                shard, int(self.index.offset[i]), int(self.index.size[i])
            )
            for i in range(first, last)
        }


def build_index(paths: Sequence[Path], digest: str) -> ShardIndex:
    """Return the index of shards; this reads the header of each member.

    Raises:
        DataError: a shard cannot be indexed.
    """
    suffix_numbers: dict[str, int] = {}
    suffix, offset, size = array("i"), array("q"), array("q")
    group_starts, shard_starts = array("q", [0]), array("q", [0])
    for path in paths:
        groups = _groups(path)
        for members in groups.values():
            for name, info in members.items():
                suffix.append(suffix_numbers.setdefault(name, len(suffix_numbers)))
                offset.append(info.offset_data)
                size.append(info.size)
            group_starts.append(len(offset))
        shard_starts.append(len(group_starts) - 1)
    return ShardIndex(
        np.array([*suffix_numbers], np.str_),
        np.array(suffix, np.int32),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(group_starts, np.int64),
        np.array(shard_starts, np.int64),
        np.array(digest),
    )


def _groups(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return the members of a shard by key and suffix."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    unused = []
    for info in _members(path):
        match = MEMBER.fullmatch(info.name)
        if not match or match["key"].startswith("__"):
            unused.append(info.name)
            continue
        members, suffix = groups.setdefault(match["key"], {}), match["suffix"].lower()
        if suffix in members:
            raise DataError(
                f"'{path}' has {info.name} twice, capitals aside; expected one file of each suffix for a key."
            )
        members[suffix] = info
    if unused:
        log.warning("'%s': not used, as named otherwise than KEY.SUFFIX: %s", path, list_briefly(unused))
    if not groups:
        raise DataError(f"'{path}' has no samples; expected members such as 0001.jpg and 0001.txt.")
    return groups


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files in an archive, and check that it is complete."""
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if info.issparse() or info.islnk() or info.issym():
                    raise DataError(f"'{path}': {info.name} is a link or sparse; expected a plain file.")
                end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
                if info.isreg():
                    yield info
    except (tarfile.TarError, OSError) as error:
        hint = "Expected a complete, uncompressed tar archive: members of a compressed one cannot be read"
        raise DataError(
            f"'{path}' cannot be read as a tar archive: {error}. {hint} at random. Decompress it, or fetch it"
            " again."
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(BLOCK)
        if len(rest) == BLOCK and not any(rest):
            while rest and not any(rest):
                rest = file.read(1 << 20)
            if not rest:
                return
    state = "is cut short, or damaged," if len(rest) < BLOCK or end == 0 else "continues"
    raise DataError(
        f"'{path}' {state} after {end:,} bytes: expected blocks of zeros at its end, after the last member."
        " Fetch it again; archives that were appended to each other have to be separate files."
    )


def read_index(file: Path, digest: str) -> ShardIndex | None:
    """Return an index that `write_index` wrote; None if there is none, or it is not of these shards."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays: dict[str, NDArray[Any]] = {
                field.name: content[field.name] for field in fields(ShardIndex)
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(
            f"the index '{file}' cannot be read: {error}. Expected a file that this source wrote: remove it,"
            " or set `index` to another."
        ) from error
    return ShardIndex(**arrays) if str(arrays["digest"]) == digest else None


def write_index(index: ShardIndex, file: Path) -> None:
    """Write an index atomically.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(file, error=DataError) as temporary, temporary.open("wb") as output:
            np.savez(output, **{field.name: getattr(index, field.name) for field in fields(index)})
    except OSError as error:
        raise DataError(f"the index '{file}' cannot be written: {error}. Set `index` to another.") from error
