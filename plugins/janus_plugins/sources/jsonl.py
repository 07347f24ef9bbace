"""Your own data: a file of JSON objects, with images as files beside it.

The file has an object a line, or is an array of objects. A record has one of these forms::

    {"text": "Plain text to learn."}
    {"image": "cats/1.png", "caption": "A cat on a mat."}         # by task: describe it, or draw it
    {"image": "cats/2.png", "class": "tabby cat"}                 # a caption by `templates`
    {"messages": [{"role": "user", "content": ["What is this?", {"image": "cats/1.png"}]},
                  {"role": "assistant", "content": "A cat. I can draw one too:"}]}

The forms of LLaMA-Factory, OpenAI, LLaVA, ShareGPT and image folders are read too; each has an example in
docs/how-to/data-formats.md. An image is an input in a user's message and a target in an assistant's message,
unless written as ``{"read": FILE}`` or ``{"draw": FILE}``. The assistant's texts are supervised.

A key of a record is used, is known to have no effect, or is an error with the number of its line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from janus_modular import DataError, Registry, Sample, Source, hookimpl
from janus_plugins.records.files import RecordFile
from janus_plugins.records.hub import local_path
from janus_plugins.records.images import ImageFolder
from janus_plugins.records.options import RecordOptions
from janus_plugins.records.reader import RecordReader, located


@dataclass
class JsonlConfig(RecordOptions):
    """The file, and the task of its captions."""

    expected: ClassVar[str] = "a .jsonl or .json file"

    path: str = (
        ""  # the file: a JSON object a line, or a JSON array; or hf://datasets/OWNER/NAME/FILE on the hub
    )
    images: str | None = None  # folder of the images; null: the file's own
    outside: bool = False  # allow images outside the folder (absolute paths, ..)
    ignore: list[str] = field(default_factory=list)  # keys without effect, in records and inside them


class Jsonl:
    """The records of a file as samples."""

    def __init__(self, config: JsonlConfig) -> None:
        """Find the records.

        Raises:
            DataError: there is no such file, no record in it, or no folder of images.
        """
        self.config = config
        self.path = Path(local_path(config.path)).expanduser()
        self.records = RecordFile(self.path)
        folder = Path(config.images).expanduser() if config.images else self.path.parent
        if not folder.is_dir():
            raise DataError(f"the folder of images '{folder}' does not exist: set `images`.")
        self._reader = RecordReader(ImageFolder(folder, config.outside), config, config.ignore)

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file; the images that it names are not part of it."""
        return self.records.digest

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return the sample of record ``index``; ``rng`` chooses among captions, templates and questions.

        Raises:
            DataError: the record cannot be used; says the file, the line and the reason.
            UnsupervisedError: an answer that is to be learned is empty.
        """
        with located(lambda: f"{self.path}, line {self.records.line_number(index)}"):
            return self._reader.sample(self.records[index], rng)


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``jsonl``."""
    registry.add("jsonl", Jsonl, JsonlConfig)
