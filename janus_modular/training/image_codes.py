"""A folder of encoded target images, found by the content of their pixels. No torch.

The folder has a ``manifest.json``, which says what the codes depend on, shards of images with their codes,
``shard-00000.npy``, and an index, ``index.npy``. All arrays are in NumPy's format and are mapped into memory,
so that several processes share them. An image is known by a hash of its pixels after the transform: equal
pixels have equal codes, whatever file or augmentation they come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.atomic_writes import TEMPORARY, atomic_replace, folder_lock, write_text
from janus_modular.config import flatten
from janus_modular.errors import TrainingError
from janus_modular.foreign import foreign_errors, read_json
from janus_modular.sequence import EncodedSpec
from janus_modular.sequence import Sequence as TokenSequence

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
SHARD_IMAGES = 8192
"""Images of a shard: what a killed process has to encode again."""

MAX_OPEN = 256
"""Shards that are mapped at once; a process may open about a thousand files."""

DIGEST_BYTES = 16
SHARD_BITS = np.uint64(32)
ENCODE_AGAIN = "`janus-modular data encode CONFIG` with another codes.path encodes the images anew"

Array = NDArray[Any]


def stored_dtype(spec: EncodedSpec) -> np.dtype[Any]:
    """Return the smallest dtype that holds the codes, or float32."""
    return np.dtype(np.float32) if spec.ids is None else np.min_scalar_type(max(spec.ids) - 1)


def image_bytes(spec: EncodedSpec) -> int:
    """Return the bytes that an image takes on disk, with its part of the index."""
    return DIGEST_BYTES + stored_dtype(spec).itemsize * int(np.prod(spec.shape)) + 16


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return the hash of the pixels (3, H, W) of an image."""
    header = str(pixels.shape).encode()
    return blake2b(header + np.ascontiguousarray(pixels).tobytes(), digest_size=DIGEST_BYTES).digest()


class ImageCodes:
    """The codes of images in a folder, read by any number of threads and processes."""

    def __init__(self, folder: Path, spec: EncodedSpec, origin: Mapping[str, Any]) -> None:
        """Open the folder.

        Args:
            folder: that `ImageCodesWriter` has written.
            spec: the form of an image's codes.
            origin: what the codes depend on; it must equal the manifest's.

        Raises:
            TrainingError: there is no such folder, it is not complete, or its codes are of another tokenizer
                or transform; says what differs.
        """
        self.folder, self.spec = folder, spec
        check_origin(folder, origin)
        if not (folder / INDEX).is_file():
            raise TrainingError(
                f"{folder} is not complete: it has no {INDEX}. `janus-modular data encode CONFIG` goes on"
                " where it was interrupted."
            )
        keys_and_rows = _load(folder / INDEX)
        if keys_and_rows.ndim != 2 or len(keys_and_rows) != 2 or keys_and_rows.dtype != np.uint64:
            raise TrainingError(f"{folder / INDEX} is damaged: remove it, and run `data encode` again.")
        self._keys, self._rows = keys_and_rows
        self._shard = lru_cache(MAX_OPEN)(self._open_shard)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._keys)

    def find(self, pixels: NDArray[np.uint8]) -> Array | None:
        """Return the codes of an image by its pixels (3, H, W); None if it is not in the folder."""
        content = digest(pixels)
        key = _key(content)
        for position in range(*(int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))):
            row = self._rows[position]
            image = self._shard(int(row >> SHARD_BITS))[int(row & np.uint64(0xFFFFFFFF))]
            if image["digest"].tobytes() == content:
                return np.array(image["codes"], self.spec.dtype)
        return None

    def encode(self, sequence: TokenSequence) -> TokenSequence:
        """Return a sequence with codes in place of the pixels of its target images.

        Raises:
            TrainingError: an image is not in the folder.
        """
        images = [x if x.dtype != np.uint8 else self.find(x) for x in sequence.generation_images]
        known = [image for image in images if image is not None]
        if len(known) < len(images):
            raise TrainingError(
                f"source '{sequence.source}': a target image is not in {self.folder}. Were images added or"
                " changed, or other augmentation chosen? `janus-modular data encode CONFIG` adds it."
            )
        return replace(sequence, generation_images=known)

    def _open_shard(self, number: int) -> Array:
        return _open_shard(self.folder, number, self.spec)


class ImageCodesWriter:
    """Adds images to a folder of codes; `opened` locks the folder, and completes it at the end."""

    def __init__(self, folder: Path, spec: EncodedSpec) -> None:
        self.folder, self.spec = folder, spec
        self.dtype = _record_dtype(spec)
        self.locations: dict[bytes, int] = {}  # shard and row, by digest
        self._waiting: list[tuple[bytes, Array]] = []
        self._next_shard = 0

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, spec: EncodedSpec, origin: Mapping[str, Any]) -> Iterator[ImageCodesWriter]:
        """Yield a writer that knows the images which are in the folder already.

        What was added is kept if the block fails or is interrupted; the index is written if it ends well.

        Raises:
            TrainingError: another process writes the folder; or it holds other files, or codes of another
                tokenizer or transform.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, error=TrainingError):
            if _has_files(folder):
                check_origin(folder, origin)
            folder.mkdir(exist_ok=True)
            write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **origin}, indent=2) + "\n")
            writer = cls(folder, spec)
            writer._read_shards()
            try:
                yield writer
            finally:
                writer._write_shard()
            writer._write_index()

    def __contains__(self, content: bytes) -> bool:
        """Return True if an image with this digest was added."""
        return content in self.locations

    def add(self, content: bytes, codes: Array) -> None:
        """Add the codes of an image with this digest."""
        if content in self.locations:
            return
        self.locations[content] = self._next_shard << int(SHARD_BITS) | len(self._waiting)
        self._waiting.append((content, codes))
        if len(self._waiting) == SHARD_IMAGES:
            self._write_shard()

    def _read_shards(self) -> None:
        """Read the digests of finished shards, in the order of their numbers."""
        for number in sorted(int(path.stem[6:]) for path in self.folder.glob("shard-*.npy")):
            for row, content in enumerate(_open_shard(self.folder, number, self.spec)["digest"]):
                self.locations[content.tobytes()] = number << int(SHARD_BITS) | row
            self._next_shard = number + 1

    def _write_shard(self) -> None:
        if not self._waiting:
            return
        images = np.empty(len(self._waiting), self.dtype)
        for row, (content, codes) in enumerate(self._waiting):
            images[row] = (np.frombuffer(content, np.uint8), codes)
        _save(_shard_path(self.folder, self._next_shard), images)
        self._next_shard += 1
        self._waiting.clear()

    def _write_index(self) -> None:
        keys = np.array([_key(content) for content in self.locations], np.uint64)
        rows = np.fromiter(self.locations.values(), np.uint64, len(self.locations))
        order = np.argsort(keys, kind="stable")
        _save(self.folder / INDEX, np.stack([keys[order], rows[order]]))


def check_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Check that the codes of a folder depend on the same as ``origin`` says.

    Raises:
        TrainingError: there is no such folder, or something differs; says what.
    """
    if not (folder / MANIFEST).is_file():
        hint = (
            "choose another codes.path"
            if _has_files(folder)
            else "run `janus-modular data encode CONFIG` first"
        )
        raise TrainingError(
            f"{folder} holds no codes of images: it has no {MANIFEST}. Expected them: {hint}."
        )
    recorded = read_json(folder / MANIFEST, TrainingError)
    if recorded.get("format") != FORMAT:
        raise TrainingError(
            f"{folder} has the format {recorded.get('format')!r}; expected {FORMAT}: {ENCODE_AGAIN}."
        )
    before, now = (
        flatten(json.loads(json.dumps(values))) for values in (recorded, {"format": FORMAT, **origin})
    )
    if keys := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        lines = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in keys)
        raise TrainingError(
            f"the codes in {folder} are of another image tokenizer or transform:\n{lines}\nStart from the"
            f" weights that they were encoded with; or {ENCODE_AGAIN}."
        )


def _has_files(folder: Path) -> bool:
    """Return True if a folder holds more than what a killed writer was writing."""
    return folder.is_dir() and not all(TEMPORARY.match(path.name) for path in folder.iterdir())


def _record_dtype(spec: EncodedSpec) -> np.dtype[Any]:
    return np.dtype([("digest", np.uint8, (DIGEST_BYTES,)), ("codes", stored_dtype(spec), tuple(spec.shape))])


def _key(content: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(content[:8], "little"))


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.npy"


def _open_shard(folder: Path, number: int, spec: EncodedSpec) -> Array:
    path = _shard_path(folder, number)
    images = _load(path)
    if images.dtype != _record_dtype(spec) or images.ndim != 1:
        raise TrainingError(
            f"{path} holds {images.dtype}; expected {_record_dtype(spec)}. Remove it, and run `janus-modular"
            " data encode CONFIG` again."
        )
    return images


def _load(path: Path) -> Array:
    hint = "Remove it, and run `janus-modular data encode CONFIG` again."
    with foreign_errors(path, TrainingError, hint):
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array


def _save(path: Path, array: Array) -> None:
    try:
        with atomic_replace(path, error=TrainingError) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}. Is the disk full?") from error


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
