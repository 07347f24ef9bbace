"""Weight files by content: written as a stream, named by their hash, read by byte range. numpy only.

The files are safetensors; ONNX calls a tensor in such a file "external data": a file, an offset, a length.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from janus_modular.safetensors_headers import ITEM_BITS, encode_header, tensor_bytes

ALIGNMENT = 64
"""Alignment in bytes. Tensors whose size is a multiple come first, so that all large ones are aligned."""


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its description, and a function that yields its bytes in chunks."""

    name: str
    dtype: str  # as in safetensors headers: F32, BF16, U8, ...
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]  # flat arrays or buffers, in order

    @property
    def size(self) -> int:
        """The size in bytes."""
        return tensor_bytes(self.dtype, self.shape)


def write_stream(
    tensors: Sequence[Stored], folder: Path, *, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Write tensors into ``folder`` as ``<sha256>.safetensors``.

    ``on_progress`` gets the bytes done and in total. Each chunk is released once it is
    written; an unfinished file has a temporary name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(
        tensors, key=lambda tensor: (tensor.size % ALIGNMENT != 0, -ITEM_BITS[tensor.dtype], tensor.name)
    )
    header, total, done = _header(ordered), sum(tensor.size for tensor in tensors), 0
    state, digest = folder / "unfinished", hashlib.sha256(header)
    try:
        with state.open("wb") as file:
            file.write(header)
            for tensor in ordered:
                end = done + tensor.size
                for chunk in tensor.chunks():
                    view = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
                    file.write(view)
                    digest.update(view)
                    done += len(view)
                    on_progress(done, total)
                if done != end:
                    raise ValueError(
                        f"{tensor.name}: {done - end:+} bytes relative to the {tensor.size} expected"
                    )
            file.flush()
            os.fsync(file.fileno())
        return state.rename(folder / f"{digest.hexdigest()}.safetensors")
    finally:
        state.unlink(missing_ok=True)


def split(tensors: Sequence[Stored], most: int | None) -> list[list[Stored]]:
    """Split tensors into files of at most ``most`` bytes, header included; None: one file.

    Raises:
        ValueError: a single tensor is larger.
    """
    files: list[list[Stored]] = [[]]
    for tensor in tensors:
        if most is not None and files[-1] and _file_size([*files[-1], tensor]) > most:
            files.append([])
        files[-1].append(tensor)
        if most is not None and len(files[-1]) == 1 and _file_size([tensor]) > most:
            raise ValueError(f"'{tensor.name}' takes {_file_size([tensor]):,} bytes in a file of its own")
    return files


def _file_size(tensors: Sequence[Stored]) -> int:
    return len(_header(tensors)) + sum(tensor.size for tensor in tensors)


def _header(ordered: Sequence[Stored]) -> bytes:
    tensors = ((tensor.name, tensor.dtype, tensor.shape) for tensor in ordered)
    return encode_header(tensors, alignment=ALIGNMENT)


def chunks(rows: int, row_bytes: int, most: int) -> Iterator[slice]:
    """Cut ``rows`` into slices of at most ``most`` bytes, but at least one row each."""
    step = max(1, most // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
