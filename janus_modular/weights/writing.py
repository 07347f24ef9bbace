"""Writes checkpoints under a temporary path that is then renamed, tensors one at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular.atomic_writes import atomic_replace_folder
from janus_modular.errors import CheckpointError
from janus_modular.foreign import printable
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.lock import drop_outdated_lock
from janus_modular.safetensors_headers import encode_header
from janus_modular.weights import checksums
from janus_modular.weights.checksums import HashingFile
from janus_modular.weights.loading import non_finite

log = logging.getLogger(__name__)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors headers."""

MAX_SHARD_SIZE = 5_000_000_000  # bytes

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "processor.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "training.json",
    "training*.safetensors",
    checksums.FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Files of a checkpoint in any format; a new checkpoint replaces all of them, so that no old shard stays."""


@contextmanager
def replace_checkpoint(folder: Path, *, replaces: str, plugins: Plugins | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of ``folder``; when the block ends well, it takes the folder's place.

    An empty folder may be replaced, and a checkpoint of model type ``replaces``. Files that are no part of a
    checkpoint (notes, images) stay in the folder; the lock of its plugins does if it holds for ``plugins``,
    of which the new checkpoint is (None: all installed ones). On an error the folder stays as it was, and no
    temporary file remains.

    Raises:
        CheckpointError: the folder is something else, another process is writing to it, or the disk is full.
    """
    folder = folder.resolve()  # of a link, the target is replaced
    try:
        with atomic_replace_folder(folder, error=CheckpointError) as temporary:
            if folder.exists() and not _replaceable(folder, replaces):
                raise CheckpointError(
                    f"{folder} exists and is no {replaces} checkpoint, so it is not replaced. Choose another"
                    " folder."
                )
            yield temporary
            if folder.exists():
                _keep_user_files(folder, temporary)
                drop_outdated_lock(temporary, folder, plugins or default_plugins())
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(folder: Path, error: OSError) -> CheckpointError:
    """Return the error that says that the checkpoint ``folder`` could not be written."""
    return CheckpointError(
        f"{folder} could not be written: {error}. Existing files are unchanged;"
        f" {shutil.disk_usage(_existing(folder)).free / 1e9:.2f} GB are free on that disk."
    )


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> dict[str, str]:
    """Write ``model.safetensors``, or shards of at most ``max_shard_size`` bytes and their index.

    Return the SHA-256 of each file by its name, computed while writing.

    Floating-point tensors are cast to ``dtype`` (None: as they are) one at a time. A shard is in memory until
    it is written, and mapped tensors never are. Weights that hold NaN or infinity are written as they are,
    with a warning that names them.

    Raises:
        CheckpointError: a tensor holds a number that ``dtype`` cannot hold.
    """
    shards: list[Path] = []
    hashes: list[str] = []
    shard_of: dict[str, int] = {}
    not_finite: list[str] = []
    total = 0
    for names, shard in _shards(tensors, dtype, max_shard_size):
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        shard_of |= dict.fromkeys(names, len(shards) - 1)
        size, digest, spoiled = write_shard(shards[-1], shard, dtype=dtype)
        total += size
        hashes.append(digest)
        not_finite += spoiled
    if not_finite:
        log.warning(
            "these weights hold NaN or infinity, and are written as they are: %s%s",
            ", ".join(map(printable, not_finite[:5])),
            f" and {len(not_finite) - 5} more weights" if len(not_finite) > 5 else "",
        )
    finals = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        finals = ["model.safetensors"]
    for shard_path, final in zip(shards, finals, strict=True):
        shard_path.rename(folder / final)
    written = dict(zip(finals, hashes, strict=True))
    if len(shards) == 1:
        return written
    weight_map = {name: finals[number] for name, number in shard_of.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return written


def write_json(path: Path, content: Any) -> None:
    """Write a mapping as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _shards(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, most: int
) -> Iterator[tuple[list[str], list[tuple[str, Tensor]]]]:
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        added = tensor.numel() * _stored(tensor, dtype).itemsize
        if shard and size + added > most:
            yield [name for name, _ in shard], shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += added
    yield [name for name, _ in shard], shard


def write_shard(
    path: Path,
    tensors: list[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    before_tensor: Callable[[], None] = lambda: None,
) -> tuple[int, str, list[str]]:
    """Write a safetensors file; return the bytes of its data, its hash, and the weights that are not finite.

    Large dtypes come first, so that every tensor is aligned to its own size. ``metadata`` go into the header.
    ``before_tensor`` is called before each tensor is written, and may raise.
    """
    tensors = sorted(tensors, key=lambda pair: -_stored(pair[1], dtype).itemsize)
    shapes = ((name, DTYPES[_stored(tensor, dtype)], tensor.shape) for name, tensor in tensors)
    header = encode_header(shapes, metadata=metadata)
    size = sum(tensor.numel() * _stored(tensor, dtype).itemsize for _, tensor in tensors)
    not_finite: list[str] = []
    with HashingFile(path) as file:
        file.write(header)
        for name, tensor in tensors:
            before_tensor()
            data = tensor.detach().to("cpu", _stored(tensor, dtype)).contiguous().view(-1)
            if data.dtype != tensor.dtype:
                _check_cast(name, tensor, data)
            not_finite += non_finite({name: data})
            file.write(data.view(torch.uint8).numpy().data)
    return size, file.hexdigest(), not_finite


def _check_cast(name: str, tensor: Tensor, cast: Tensor) -> None:
    """Check that no finite number became infinite in a cast, as 1e5 does in float16.

    Raises:
        CheckpointError: a number did; names the weight and its largest number.
    """
    if not cast.numel() or torch.stack(torch.aminmax(cast)).isfinite().all():
        return
    numbers = tensor.detach().flatten().to("cpu")
    lost = numbers[numbers.isfinite() & ~cast.isfinite()]
    if lost.numel():
        dtype = str(cast.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} holds {float(lost.abs().max()):g}, more than {dtype} can hold"
            f" ({torch.finfo(cast.dtype).max:g}). Choose bfloat16, float32 or auto as dtype."
        )


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def is_checkpoint_file(name: str) -> bool:
    """Return True if a file of this name is part of a checkpoint; other files are the user's."""
    return any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)


def _replaceable(folder: Path, model_type: str) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == model_type


def _keep_user_files(folder: Path, temporary: Path) -> None:
    """Link or copy files that a user put into the checkpoint ``folder`` into its replacement."""
    for path in folder.iterdir():
        target = temporary / path.name
        if target.exists() or is_checkpoint_file(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=link)
        else:
            link(path, target)


def link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file; copy it where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # for example on another disk
        shutil.copy2(source, target, follow_symlinks=False)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
