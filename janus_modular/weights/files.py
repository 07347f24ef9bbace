"""Opens weight files (safetensors or PyTorch's, single or sharded) as a lazy mapping of names to tensors."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from janus_modular.errors import CheckpointError
from janus_modular.foreign import MAX_DEPTH, foreign_errors, printable, read_json, reason
from janus_modular.safetensors_headers import FileSizeError, byte_ranges
from janus_modular.weights.chunks import chunk_files, open_chunks

log = logging.getLogger(__name__)

Read = Callable[[], Tensor]

PREFERRED = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MAX_NAMES = 500_000
"""Mappings and tensors in one PyTorch file; the largest models have some tens of thousands."""
TRAINERS = ("pytorch_lightning.", "lightning.")
"""Packages whose checkpoints hold objects of their own beside the weights, read as `StandIn`s."""


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint, by name.

    Reading a name maps the file privately: its pages count as file cache, not as the process's memory, until
    they are written to. ``used`` holds the names that were read, from which `unexpected_keys` follow.
    """

    def __init__(self, path: Path, reads: Mapping[str, Read]) -> None:
        self.path = path
        self.used: set[str] = set()
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        read = self._reads[name]
        self.used.add(name)
        with foreign_errors(f"{self.path}: the weight '{name}'", CheckpointError):
            return read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)

    def __contains__(self, name: object) -> bool:
        return name in self._reads  # without reading the tensor

    def unexpected_keys(self) -> list[str]:
        """Return the names of the tensors that were never read."""
        return sorted(set(self._reads) - self.used)


def open_weights(path: Path) -> Weights:
    """Open a weight file, or the checkpoint in a folder.

    Containers in PyTorch files are flattened, so that a LlamaGen file's names begin with ``ema.`` or
    ``model.``; values that are no tensors are ignored.

    Raises:
        CheckpointError: there are no weights, or a file is damaged, missing, or not as its index says.
    """
    with foreign_errors(path, CheckpointError):  # invalid file names, unreadable folders
        if path.is_dir() and (files := chunk_files(path)):
            if whole := next((name for name in PREFERRED if (path / name).exists()), None):
                raise CheckpointError(
                    f"{path} holds both {whole} and {files[0].name}: expected the weights of one checkpoint,"
                    " whole or in chunks. Remove those of the other"
                )
            return Weights(path, open_chunks(files))
        file = _weight_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json") and path.is_dir():
        return Weights(path, _open_shards(file))
    return Weights(path, _open_file(file))


def _weight_file(folder: Path) -> Path:
    """Return the weights in a folder: safetensors before PyTorch's, an index before a single file."""
    for name in PREFERRED:
        for candidate in (folder / f"{name}.index.json", folder / name):
            if candidate.exists():
                return candidate
    for pattern in (
        "*.safetensors.index.json",
        "*.safetensors",
        "*.bin.index.json",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
    ):
        candidates = sorted(folder.glob(pattern))
        if len(candidates) > 1:
            names = ", ".join(c.name for c in candidates)
            raise CheckpointError(
                f"{folder} holds several weight files and no index that joins them: {names}.\n"
                "Name one of them, or add the *.index.json that belongs to them."
            )
        if candidates:
            return candidates[0]
    raise CheckpointError(
        f"{folder} holds no weights: expected a file ending in {', '.join(SUFFIXES)}, or an index of shards."
    )


def _open_shards(index: Path) -> dict[str, Read]:
    """Join the shards that an index names, and check that each holds the weights that the index lists."""
    weight_map = read_json(index, CheckpointError).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    files = weight_map.values()
    if not files or not all(isinstance(name, str) for name in files):
        raise CheckpointError(
            f"{index} is not an index of shards: expected weight_map, from a weight's name to its file's."
            " Fetch it again."
        )
    shards = sorted(set(files))
    if outside := [name for name in shards if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise CheckpointError(
            f"{index} is not an index of shards: it names files outside of its folder:"
            f" {printable(', '.join(outside))}. Fetch it again."
        )
    with foreign_errors(index, CheckpointError):
        missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards named in {index.name}:"
            f" {printable(', '.join(missing))}. Fetch them again."
        )
    reads: dict[str, Read] = {}
    for shard in shards:
        shard_reads = _open_file(index.parent / shard)
        actual, expected = shard_reads.keys(), {name for name, file in weight_map.items() if file == shard}
        if actual != expected:
            raise CheckpointError(
                f"{index.parent / shard} differs from {index.name}:"
                f"{_first(' it lacks', expected - actual)}{_first(' it also holds', actual - expected)}"
                " Shards and index are of different checkpoints."
            )
        reads |= shard_reads
    return reads


def _first(verb: str, names: set[str]) -> str:
    return (
        f"{verb} {printable(', '.join(sorted(names)[:5]))}{', ...' if len(names) > 5 else ''}."
        if names
        else ""
    )


def _open_file(path: Path) -> dict[str, Read]:
    with foreign_errors(path, CheckpointError):
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}.")
        if _is_program(path):
            raise CheckpointError(
                f"{path} is a TorchScript program: code from weight files is never run. Get the weights as"
                " .safetensors; where you trust the program, save what torch.jit.load(...).state_dict()"
                " returns."
            )
        if path.suffix not in SUFFIXES:
            raise CheckpointError(
                f"{path} is not a weight file: expected one ending in {', '.join(SUFFIXES)}."
            )
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(path: Path) -> dict[str, Read]:
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        try:
            byte_ranges(path)
        except FileSizeError as size_error:
            raise CheckpointError(f"{size_error}. Fetch it again.") from error
        except Exception:  # a malformed header: the parser's own message says more
            pass
        raise CheckpointError(f"{path} cannot be read: {reason(error)}. Fetch it again.") from error
    return {name: partial(file.get_tensor, name) for name in list(file.keys())}


def _is_program(path: Path) -> bool:
    """Return True for an archive of TorchScript: it has constants, which files of tensors have not.

    Raises:
        CheckpointError: the archive is damaged, or would unpack to more than it is.
    """
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile trusts the fields of the list of contents
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged: a zip archive whose list of contents cannot be"
            f" read: {reason(error)}. Fetch it again."
        ) from error
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > size:  # PyTorch stores without compression
        raise CheckpointError(
            f"{path} would unpack to {unpacked:,} bytes, and has {size:,}: no archive that PyTorch wrote."
            " Get the weights as .safetensors."
        )
    return any(entry.filename.endswith("/constants.pkl") for entry in entries)


def _open_torch(path: Path) -> dict[str, Read]:
    """Unpickle tensors and plain containers of a PyTorch file; the old format cannot be memory-mapped."""
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # a zip archive, whole or not
    if mapped and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short: a zip archive whose list of"
            " contents, at its end, is missing. Fetch it again."
        )
    if not mapped and path.stat().st_size:
        log.warning(
            "%s is in PyTorch's old format, which cannot be mapped: reading it takes %.2f GB of memory",
            path,
            path.stat().st_size / 1e9,
        )
    try:
        # LlamaGen's files hold their training arguments, Lightning's the classes of its callbacks.
        stand_ins = (
            [(StandIn, name) for name in _unsafe_globals(path) if name.startswith(TRAINERS)] if mapped else []
        )
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        return _flatten(content)
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise CheckpointError(
                f"{path} holds more than tensors{f' ({match[1]})' if match else ''}: code and objects are"
                " never loaded, since that could run anything. Get the weights as .safetensors, or a"
                " file that contains only tensors."
            ) from error
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is no PyTorch file of tensors, or it is damaged."
            " Fetch it again."
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise any exception
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short: {reason(error)}. Fetch it again."
        ) from error


class StandIn:
    """Replaces objects of other packages' classes in a checkpoint, and holds nothing."""

    def __init__(self, *args: object) -> None:
        """Ignore all arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


def _unsafe_globals(path: Path) -> list[str]:
    """Return the classes and functions that a PyTorch file names; nothing is imported or called."""
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _flatten(content: object) -> dict[str, Read]:
    """Return the tensors in nested mappings, by the dotted path of their keys.

    Raises:
        ValueError: mappings are nested deeper than `MAX_DEPTH` (one may hold itself), or there are more than
            `MAX_NAMES` paths (mappings that are shared at every level double them).
    """
    reads: dict[str, Read] = {}
    stack: list[tuple[str, object, int]] = [("", content, 0)]
    visited = 0
    while stack:
        prefix, value, depth = stack.pop()
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_NAMES:
            raise ValueError(
                f"its mappings are nested deeper than {MAX_DEPTH} levels, or have over {MAX_NAMES:,} names"
            )
        if isinstance(value, Mapping):
            inner = [
                (f"{prefix}.{key}" if prefix else str(key), child, depth + 1) for key, child in value.items()
            ]
            stack += reversed(inner)
        elif isinstance(value, Tensor):
            reads[prefix] = partial(_identity, value)
    return reads


def _identity(tensor: Tensor) -> Tensor:
    return tensor
