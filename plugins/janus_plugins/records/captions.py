"""Images with text: captions, class names, metadata of an image folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from janus_modular import DataError, ImageInput, ImageTarget, Message, Sample, Text
from janus_plugins.records.fields import Fields, list_of, text_of
from janus_plugins.records.images import ImageOpener
from janus_plugins.records.markers import without_markers

IMAGES = ("image", "file_name")
TEXTS = ("caption", "captions", "text", "class")


@dataclass(frozen=True)
class CaptionReader:
    """Reads an image with a caption as a description of the image, or as a request to draw it."""

    images: ImageOpener
    task: Literal["read", "draw"]
    templates: Sequence[str]
    questions: Sequence[str]
    markers: bool = True

    def sample(self, record: Fields, rng: np.random.Generator) -> Sample:
        """Return the sample of a record; ``rng`` chooses among several captions, templates and questions.

        Raises:
            DataError: there is no text, there are several texts, or a key that is not used.
            ImageError: the image cannot be read.
        """
        reference = record.take(*IMAGES)
        present = [name for name in TEXTS if name in record]
        if len(present) != 1:
            raise DataError(
                f"an image with {' and '.join(present) or 'no text'}; expected exactly one of"
                f" {', '.join(TEXTS)}: {'keep the text to learn' if present else 'add a caption'}, or write"
                f" the sample as `messages`.{'' if present else record.hint(TEXTS)}"
            )
        [name] = present
        value = record.take(*TEXTS)
        record.close()
        text = _choice(self.templates, rng).replace("{}", self._text(value, name, rng))
        if isinstance(reference, list) and len(reference) == 1:
            [reference] = reference
        if isinstance(reference, list):
            raise DataError(
                f"{len(reference)} images for one {name}; expected one image. Write several images as"
                " `messages`."
            )
        image = self.images.open(reference, "image")
        if self.task == "draw":
            return Sample([Message("user", [Text(text)]), Message("assistant", [ImageTarget(image)])])
        question = Text(_choice(self.questions, rng))
        return Sample(
            [Message("user", [ImageInput(image), question]), Message("assistant", [Text(text, True)])]
        )

    def _text(self, value: object, name: str, rng: np.random.Generator) -> str:
        if isinstance(value, list):
            value = _choice(list_of(value, name, lambda item, where: text_of(item, where)), rng)
        text = text_of(value, name).strip()
        if self.markers:
            without_markers(
                text, name, "The text beside an image is its caption; write positions as `messages`."
            )
        return text


def _choice(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
