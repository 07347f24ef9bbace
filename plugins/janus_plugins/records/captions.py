"""An image and the words that belong to it: captions, class names, imagefolder's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from janus_modular import DataError, ImageInput, ImageTarget, Message, Sample, Text
from janus_plugins.records.fields import Fields, list_of, text_of
from janus_plugins.records.images import ImageFolder
from janus_plugins.records.markers import without_markers

IMAGES = ("image", "file_name")
WORDS = ("caption", "captions", "text", "class")


@dataclass(frozen=True)
class CaptionReader:
    """Reads an image with a caption as a description of the image, or as a request to draw it."""

    images: ImageFolder
    task: Literal["read", "draw"]
    templates: Sequence[str]
    questions: Sequence[str]
    markers: bool = True

    def sample(self, record: Fields, rng: np.random.Generator) -> Sample:
        """Return a record's pair; ``rng`` chooses among several captions, templates and questions.

        Raises:
            DataError: there are no words, words of two sorts, or a key that nothing reads.
            ImageError: the image cannot be read.
        """
        reference = record.take(*IMAGES)
        present = [name for name in WORDS if name in record]
        if len(present) != 1:
            raise DataError(
                f"an image with {' and '.join(present) or 'no text'}; expected exactly one of"
                f" {', '.join(WORDS)}: {'keep the one to learn' if present else 'add a caption'}, or write"
                f" the sample as `messages`.{record.hint(WORDS)}"
            )
        [name] = present
        value = record.take(*WORDS)
        record.close()
        words = self._words(value, name, rng)
        words = _choice(self.templates, rng).replace("{}", words)
        if isinstance(reference, list) and len(reference) == 1:
            [reference] = reference
        if isinstance(reference, list):
            raise DataError(
                f"{len(reference)} images for one {name}; expected one image. Write several images as"
                " `messages`."
            )
        image = self.images.open(reference, "image")
        if self.task == "draw":
            return Sample([Message("user", [Text(words)]), Message("assistant", [ImageTarget(image)])])
        question = Text(_choice(self.questions, rng))
        return Sample(
            [Message("user", [ImageInput(image), question]), Message("assistant", [Text(words, True)])]
        )

    def _words(self, value: object, name: str, rng: np.random.Generator) -> str:
        if isinstance(value, list):
            value = _choice(list_of(value, name, lambda item, where: text_of(item, where)), rng)
        words = text_of(value, name).strip()
        if self.markers:
            without_markers(words, name, "Words beside an image are its caption; write places as `messages`.")
        return words


def _choice(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
