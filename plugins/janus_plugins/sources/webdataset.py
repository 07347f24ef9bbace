"""Tar shards in WebDataset's layout: members of a key, ``0001.jpg`` and ``0001.txt``, are a sample.

A text member (``txt``, ``text`` or ``caption``) is the caption of the image, a ``cls`` member its class; a
``json`` member is a record in any form of the source ``jsonl``, which names images by their file or suffix,
or leaves them out if all images of the key belong to it. Shards are indexed, so that samples are read in any
order, without a shuffle buffer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from janus_modular import DataError, Registry, Sample, Source, hookimpl, open_image
from janus_plugins.records.class_names import read_names
from janus_plugins.records.conversations import IMAGE_KEYS
from janus_plugins.records.fields import text_of
from janus_plugins.records.files import parse_object
from janus_plugins.records.hub import local_path
from janus_plugins.records.images import SUFFIXES
from janus_plugins.records.options import RecordOptions
from janus_plugins.records.paths import digest_of_files, expand_paths
from janus_plugins.records.reader import RecordReader, located
from janus_plugins.records.shards import Member, Shards

TEXTS = ("txt", "text", "caption")
RECORDS = (*TEXTS, "cls", "json")
"""Suffixes of the members that say what is learned."""

IMAGE_FIELDS = ("image", "images", "file_name", "input_image", "output_image")
"""Keys of a record that name images beside a text or a conversation."""


@dataclass
class WebDatasetConfig(RecordOptions):
    """The shards, and which of their members are used."""

    expected: ClassVar[str] = "tar files, such as shards/{0000..0009}.tar"

    path: str = ""  # the shards: braces, as in shards/{0000..0009}.tar, and wildcards; or hf://datasets/OWNER/NAME/FILES
    text: str | None = None  # suffix of the member that says what is learned; null: the only one that can
    names: str | None = (
        None  # of the classes in cls: lines `CLASS NAME`, or JSON: {CLASS: NAME or [NAME, ...]}
    )
    index: str | None = None  # a file that keeps the index of the shards between runs; null: none
    ignore: list[str] = field(default_factory=list)  # suffixes, and keys of json members, without effect


@dataclass(frozen=True)
class GroupImages:
    """The images of a key, opened by the name or the suffix of their member."""

    members: Mapping[str, Member]

    def open(self, reference: Any, where: str) -> Image.Image:
        """Return the image to which a record refers.

        Raises:
            DataError: the key has no such member.
            ImageError: the image is damaged or too large.
        """
        name = text_of(reference, where)
        suffix = name if name in self.members else self._suffix(PurePosixPath(name).name)
        if suffix is None:
            raise DataError(
                f"{where}: found {reference!r:.100}; expected the name or the suffix of an image beside it:"
                f" {', '.join(self.members) or 'there is none'}."
            )
        return open_image(self.members[suffix].read())

    def _suffix(self, name: str) -> str | None:
        names = ((suffix, PurePosixPath(member.name()).name) for suffix, member in self.members.items())
        return next((suffix for suffix, of_member in names if of_member == name), None)


class WebDataset:
    """The keys of tar shards as samples, in the order of the shards."""

    def __init__(self, config: WebDatasetConfig) -> None:
        """Find the samples.

        Raises:
            DataError: a shard is missing, damaged or empty, or the file of names or the index cannot be used.
        """
        self.config = config
        self.shards = Shards(
            expand_paths(local_path(config.path)), Path(config.index).expanduser() if config.index else None
        )
        self._names = read_names(Path(config.names).expanduser()) if config.names else None

    def __len__(self) -> int:
        return len(self.shards)

    def fingerprint(self) -> str:
        """Return a digest of the names and sizes of the shards, and of the names of classes."""
        names = json.dumps(self._names).encode()
        return sha256(digest_of_files(self.shards.paths).encode() + names).hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``; ``rng`` chooses among captions, templates and questions.

        Raises:
            DataError: the sample cannot be used; says the shard, a member and the reason.
            UnsupervisedError: an answer that is to be learned is empty.
        """
        members = self.shards[index]
        first = next(iter(members.values()))
        members = {suffix: member for suffix, member in members.items() if suffix not in self.config.ignore}
        with located(lambda: f"{first.shard}, {first.name()}"):
            images = {s: m for s, m in members.items() if f".{s}".endswith(SUFFIXES)}
            record = self._record(members, images)
            return RecordReader(GroupImages(images), self.config, self.config.ignore).sample(record, rng)

    def _record(self, members: Mapping[str, Member], images: Mapping[str, Member]) -> Mapping[str, Any]:
        """Return the record of a key."""
        suffix = self._text_suffix(members, images)
        form, content = suffix.rpartition(".")[2], members[suffix].read()
        if form == "json":
            return self._json_record(parse_object(content, "Expected a JSON object in UTF-8."), images)
        if not images:
            raise DataError(
                f"has no image: found {', '.join(members)}; expected a member that ends in"
                f" {', '.join(SUFFIXES)}."
            )
        try:
            text = content.decode("utf-8-sig")
        except UnicodeError as error:
            raise DataError(f"its {suffix} member cannot be read: {error}. Expected UTF-8.") from error
        if form == "cls":
            return {"image": [*images], "class": self._class(text.strip())}
        return {"image": [*images], "caption": text}

    def _json_record(self, record: Mapping[str, Any], images: Mapping[str, Member]) -> Mapping[str, Any]:
        """Return a record with the images of its key, unless it names images itself."""
        turns = record.get("messages") or record.get("conversations")
        if not images or any(record.get(name) for name in IMAGE_FIELDS) or _names_image(turns):
            return record
        return {**record, "images" if turns else "image": [*images]}

    def _text_suffix(self, members: Mapping[str, Member], images: Mapping[str, Member]) -> str:
        """Return the suffix of the member that says what is learned."""
        if self.config.text is not None:
            if self.config.text not in members:
                raise DataError(
                    f"has no {self.config.text} member: found {', '.join(members)}. Correct the option text."
                )
            return self.config.text
        further = [suffix for suffix in members if suffix not in images]
        records = [suffix for suffix in further if suffix in RECORDS]
        if len(records) != 1:
            raise DataError(
                f"has {' and '.join(records) or 'no text'}, among the members {', '.join(members)}; expected"
                f" one of {', '.join(RECORDS)}: set the option text to the suffix to learn."
            )
        if unknown := [suffix for suffix in further if suffix not in RECORDS]:
            raise DataError(
                f"found the unknown members {', '.join(unknown)}; expected images, and one of"
                f" {', '.join(RECORDS)}. Add members without effect to `ignore`."
            )
        return records[0]

    def _class(self, label: str) -> Any:
        if self._names is None:
            return label
        if label not in self._names:
            raise DataError(f"'{self.config.names}' has no name for the class {label!r:.100}: add one.")
        return self._names[label]


def _names_image(value: Any) -> bool:
    """Return True if a content part in messages names an image."""
    if isinstance(value, list):
        return any(map(_names_image, value))
    if not isinstance(value, dict):
        return False
    return any(value.get(key) for key in IMAGE_KEYS) or any(map(_names_image, value.values()))


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``webdataset``."""
    registry.add("webdataset", WebDataset, WebDatasetConfig)
