"""Samples from records of any form: conversations, captions, prompts of images, plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus_modular import (
    DataError,
    ImageError,
    ImageInput,
    ImageTarget,
    Message,
    Sample,
    Text,
    UnsupervisedError,
)
from janus_plugins.records.captions import IMAGES, TEXTS, CaptionReader
from janus_plugins.records.conversations import ConversationReader
from janus_plugins.records.fields import Fields
from janus_plugins.records.images import ImageOpener
from janus_plugins.records.markers import without_markers
from janus_plugins.records.options import RecordOptions

FORMS = ("messages", "conversations", "output_image", *IMAGES, *TEXTS)
EXPECTED = "messages, conversations, text, image and caption, text or class, or input_prompt and output_image"


@dataclass(frozen=True)
class RecordReader:
    """Reads a record by the form that its keys show."""

    images: ImageOpener
    options: RecordOptions
    ignore: Sequence[str] = ()  # keys that count as absent

    def sample(self, values: Any, rng: np.random.Generator) -> Sample:
        """Return the sample of a record; ``rng`` chooses among captions, templates and questions.

        Raises:
            DataError: the record cannot be used.
            UnsupervisedError: an answer that is to be learned is empty.
            ImageError: an image cannot be read.
        """
        record = Fields(values, ignore=self.ignore)
        markers = self.options.markers == "image"
        if "messages" in record or "conversations" in record:
            sample = ConversationReader(self.images, markers, tuple(self.ignore)).sample(record)
        elif "output_image" in record or "input_prompt" in record:
            sample = self._drawing(record)
        elif any(name in record for name in IMAGES):
            options = self.options
            captions = CaptionReader(self.images, options.task, options.templates, options.questions, markers)
            sample = captions.sample(record, rng)
        else:
            sample = self._text(record)
        if self.options.task == "draw" and not _draws(sample):
            raise DataError(
                "has no image target, and the source has task: draw; expected an image with a caption, or"
                " an image in an answer. Leave out `task` for text and conversations."
            )
        return sample

    def _drawing(self, record: Fields) -> Sample:
        """Return the sample of a prompt and its image, with the images that the prompt is about, if any."""
        prompt = record.text("input_prompt")
        target = record.take("output_image")
        inputs = record.take("input_image")
        record.close()
        if prompt is None or target is None:
            missing = "input_prompt" if prompt is None else "output_image"
            raise DataError(
                f"has no {missing}; expected input_prompt and output_image, and input_image if any."
            )
        if self.options.markers == "image":
            without_markers(
                prompt, "input_prompt", "Images in input_image are put before it: remove the marker."
            )
        if isinstance(target, list) and len(target) == 1:
            [target] = target
        listed = inputs if isinstance(inputs, list) else [] if inputs is None else [inputs]
        images = [self.images.open(image, f"input_image[{i}]") for i, image in enumerate(listed)]
        return Sample(
            [
                Message("user", [*map(ImageInput, images), Text(prompt)]),
                Message("assistant", [ImageTarget(self.images.open(target, "output_image"))]),
            ]
        )

    def _text(self, record: Fields) -> Sample:
        text = record.text("text")
        if text is None:
            present = ", ".join(k if k.isprintable() else repr(k) for k in record.values) or "nothing"
            raise DataError(f"has {present}; expected {EXPECTED}.{record.hint(FORMS)}")
        record.close()
        if self.options.markers == "image":
            without_markers(text, "text", "Name images in `images` beside `messages`.")
        return Sample([Message("assistant", [Text(text, True)])], template=False)


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Put ``where()``, the position of a record, before the errors about the record.

    Raises:
        DataError: the record, or an image of it, cannot be used.
        UnsupervisedError: nothing can be learned in it.
    """
    try:
        yield
    except (DataError, ImageError) as error:
        error_type = UnsupervisedError if isinstance(error, UnsupervisedError) else DataError
        raise error_type(f"{where()}: {error}") from error


def _draws(sample: Sample) -> bool:
    return any(isinstance(segment, ImageTarget) for m in sample.messages for segment in m.content)
