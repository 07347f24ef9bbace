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
from typing import Literal

import numpy as np

from janus_modular import (
    ComponentConfig,
    DataError,
    ImageError,
    ImageTarget,
    Message,
    Registry,
    Sample,
    Source,
    Text,
    UnsupervisedError,
    hookimpl,
)
from janus_plugins.records.captions import IMAGES, TEXTS, CaptionReader
from janus_plugins.records.conversations import ConversationReader
from janus_plugins.records.fields import Fields
from janus_plugins.records.files import RecordFile
from janus_plugins.records.images import ImageFolder
from janus_plugins.records.markers import LITERAL, first_marker, without_markers

QUESTIONS = ("Describe this image.",)
FORMS = ("messages", "conversations", *IMAGES, *TEXTS)
EXPECTED = "messages, conversations, text, or image and caption, text or class"


@dataclass
class JsonlConfig(ComponentConfig):
    """The file, and the task of its captions."""

    path: str = ""  # the file: a JSON object a line, or a JSON array of objects
    images: str | None = None  # folder of the images; null: the file's own
    task: Literal["read", "draw"] = "read"  # of captions and classes: describe the image, or draw it
    templates: list[str] = field(
        default_factory=lambda: ["{}"]
    )  # texts for captions and classes; one is chosen at random
    questions: list[str] = field(
        default_factory=lambda: list(QUESTIONS)
    )  # task read; one is chosen at random
    outside: bool = False  # allow images outside the folder (absolute paths, ..)
    markers: Literal["image", "text"] = (
        "image"  # `<image>` in a text: the position of an image, or plain text
    )
    ignore: list[str] = field(default_factory=list)  # keys without effect, in records and inside them

    def __post_init__(self) -> None:
        """Check the options, without the file."""
        if not self.path:
            raise ValueError("path: missing; expected a .jsonl or .json file.")
        if (
            not self.templates
            or not self.questions
            or not all("{}" in template for template in self.templates)
        ):
            raise ValueError(
                f"templates {self.templates}, questions {self.questions}: expected at least one of each, and"
                " {} in every template, where the caption goes."
            )
        if self.task == "draw" and self.questions != list(QUESTIONS):
            raise ValueError("questions: belong to task: read; with task: draw, leave them out.")
        if self.markers == "image" and (marker := first_marker([*self.templates, *self.questions])):
            raise ValueError(
                f"templates, questions: hold '{marker}'; expected text without a marker, as the image is put"
                f" before the question, or drawn. Remove the marker. {LITERAL}"
            )


class Jsonl:
    """The records of a file as samples."""

    def __init__(self, config: JsonlConfig) -> None:
        """Find the records.

        Raises:
            DataError: there is no such file, no record in it, or no folder of images.
        """
        self.config = config
        self.path = Path(config.path).expanduser()
        self.records = RecordFile(self.path)
        folder = Path(config.images).expanduser() if config.images else self.path.parent
        if not folder.is_dir():
            raise DataError(f"the folder of images '{folder}' does not exist: set `images`.")
        images = ImageFolder(folder, config.outside)
        markers = config.markers == "image"
        self._conversations = ConversationReader(images, markers, tuple(config.ignore))
        self._captions = CaptionReader(images, config.task, config.templates, config.questions, markers)

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
        try:
            return self._sample(index, rng)
        except (DataError, ImageError) as error:
            line = self.records.line_number(index)
            error_type = UnsupervisedError if isinstance(error, UnsupervisedError) else DataError
            raise error_type(f"{self.path}, line {line}: {error}") from error

    def _sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = Fields(self.records[index], ignore=self.config.ignore)
        if "messages" in record or "conversations" in record:
            sample = self._conversations.sample(record)
        elif any(name in record for name in IMAGES):
            sample = self._captions.sample(record, rng)
        else:
            sample = self._text(record)
        if self.config.task == "draw" and not _draws(sample):
            raise DataError(
                "has no image target, and the source has task: draw; expected an image with a caption, or"
                " an image in an answer. Leave out `task` for text and conversations."
            )
        return sample

    def _text(self, record: Fields) -> Sample:
        text = record.text("text")
        if text is None:
            present = ", ".join(k if k.isprintable() else repr(k) for k in record.values) or "nothing"
            raise DataError(f"has {present}; expected {EXPECTED}.{record.hint(FORMS)}")
        record.close()
        if self.config.markers == "image":
            without_markers(text, "text", "Name images in `images` beside `messages`.")
        return Sample([Message("assistant", [Text(text, True)])], template=False)


def _draws(sample: Sample) -> bool:
    return any(isinstance(segment, ImageTarget) for m in sample.messages for segment in m.content)


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``jsonl``."""
    registry.add("jsonl", Jsonl, JsonlConfig)
