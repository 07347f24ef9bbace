"""Headers of safetensors files, written and read without torch.

A file holds the length of its header (8 bytes, little-endian), the header (JSON), and the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ITEM_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
"""Size of a number by the name of its dtype in a header."""


class FileSizeError(ValueError):
    """A file that is shorter or longer than its header says."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor's data."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    *,
    alignment: int = 8,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return the first bytes of a file with tensors (name, dtype, shape) in this order.

    The data begin at a multiple of ``alignment`` bytes. ``metadata`` are further entries of the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Return the offset in the file and the length of each tensor's data, in bytes.

    Raises:
        FileSizeError: the file is cut short, or has more data than its header says.
        Exception: the header is malformed; of any class.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise FileSizeError(f"{path} has {size} bytes, too few for the header that it declares")
        header = json.loads(file.read(length))
    offsets = {name: value["data_offsets"] for name, value in header.items() if name != "__metadata__"}
    promised = 8 + length + max((end for _, end in offsets.values()), default=0)
    if size != promised:
        raise FileSizeError(f"{path} has {size} bytes, its header promises {promised}")
    return {name: (8 + length + start, end - start) for name, (start, end) in offsets.items()}
