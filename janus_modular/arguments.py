"""Checks the types of arguments to the Python API, without torch.

Without these checks a wrong type would fail later or not at all: a string, for instance, is a sequence of
strings too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from janus_modular.errors import ConfigError, PromptError
from janus_modular.processing.image_io import ImageSource, open_image
from janus_modular.sequence import ImageInput, ImageTarget, Message, Segment, Text

SEGMENTS = (Text, ImageInput, ImageTarget)


def folder_path(value: Any, name: str) -> str | Path:
    """Return a path or a hub id.

    Raises:
        ConfigError: the value is neither a string nor a path.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise ConfigError(f"{name}: found {value!r:.80}; expected a text or a pathlib.Path.")
    return value if isinstance(value, str) else Path(value)


def option(value: Any, name: str, *types: type, expected: str) -> Any:
    """Return the value of a keyword argument, which must have one of the types.

    Raises:
        ConfigError: the value has another type.
    """
    if not isinstance(value, types):
        raise ConfigError(f"{name}: found {value!r:.80}; expected {expected}.")
    return value


SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The short names of dtypes, which are accepted wherever a long name is."""


def dtype_name(value: Any) -> Any:
    """Return the long name of a dtype: ``bfloat16`` for ``bf16`` or torch's; anything else as it is."""
    name = str(value).removeprefix("torch.")
    return next((long for long, short in SHORT_DTYPES.items() if name in (long, short)), value)


MAX_COUNT = 1_000_000
"""Largest number of images in a call of `Janus.draw`, and in a batch."""


def count(value: Any, name: str) -> int:
    """Return a whole number from 1 to `MAX_COUNT`.

    Raises:
        PromptError: the value is something else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= MAX_COUNT:
        raise PromptError(f"{name}: found {value!r:.80}; expected a whole number from 1 to {MAX_COUNT:,}.")
    return int(value)


def seconds(value: Any, name: str) -> float | None:
    """Return a time in seconds from 0, or None.

    Raises:
        PromptError: the value is something else, or not finite.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value < inf):
        raise PromptError(f"{name}: found {value!r:.80}; expected a number of seconds from 0, or None.")
    return None if value is None else float(value)


def callback(value: Any, name: str) -> Callable[..., Any] | bool | None:
    """Return the value: a callback, True or False (show progress or not), or None.

    Raises:
        PromptError: the value is something else.
    """
    if not (value is None or isinstance(value, bool) or callable(value)):
        raise PromptError(f"{name}: found {value!r:.80}; expected a function, True, False or None.")
    return value


def stop_strings(value: Any) -> list[str]:
    """Return the strings before which an answer ends.

    Raises:
        PromptError: the value is a single string or holds something else than strings, or a string is empty.
    """
    strings = texts(value, "stop", "a list of strings, [...]")
    if "" in strings:
        raise PromptError(
            f"stop: found an empty string among {strings!r:.200}; expected at least one character."
        )
    return strings


def drawing_prompts(value: Any) -> list[str]:
    """Return the texts of a call of `Janus.log_probabilities`.

    Raises:
        PromptError: the value is neither a text nor a list of texts.
    """
    return texts(value, "prompt", "a text or a list of texts", allow_single=True)


ImageForm = Literal["input", "encoded", "both"]
"""How an image of a prompt is given: to the understanding path, as it is drawn, or one after the other."""


IMAGE_FORMS: tuple[ImageForm, ...] = get_args(ImageForm)


def drawing_conversations(value: Any, images: Any, form: Any) -> list[list[Message]]:
    """Return the conversations of a call of `Janus.draw`: one of each text, or the one that is given.

    Raises:
        PromptError: the value is none of these, or images are given beside a conversation.
    """
    if form not in IMAGE_FORMS:
        raise PromptError(f"image_form: found {form!r:.80}; expected {', '.join(IMAGE_FORMS)}.")
    opened = opened_images(images)
    if form != IMAGE_FORMS[0] and not opened:
        raise PromptError(f"image_form: found {form!r} without images; expected images that it is about.")
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        value = list(value)
        if value and all(isinstance(item, Message) for item in value):
            return [conversation(value, images)]
    expected = "a text, a list of texts, or one conversation, a list of messages"
    prompts = texts(value, "prompt", expected, allow_single=True)
    segments = [segment for image in opened for segment in _image_segments(image, form)]
    return [[Message("user", [*segments, Text(text)])] for text in prompts]


def _image_segments(image: Image.Image, form: str) -> list[Segment]:
    """Return the segments of an image that a prompt gives; both forms are those of Janus-4o."""
    read: list[Segment] = [ImageInput(image)]
    encoded: list[Segment] = [ImageTarget(image, supervised=False)]
    return {"input": read, "encoded": encoded, "both": read + encoded}[form]


def texts(
    value: Any, name: str, expected: str = "a list of texts", *, allow_single: bool = False
) -> list[str]:
    """Return texts as a list; ``allow_single``: a text alone is a list of itself.

    Raises:
        PromptError: the value is something else.
    """
    if isinstance(value, str):
        if allow_single:
            return [value]
        raise PromptError(f"{name}: found {value!r:.80}; expected {expected}.")
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else None
    if items is None:
        raise PromptError(f"{name}: found {value!r:.80}; expected {expected}.")
    for item in items:
        if not isinstance(item, str):
            raise PromptError(f"{name}: found {item!r:.80} among the texts; expected {expected}.")
    return items


def questions(value: Any) -> list[tuple[Any, Any]]:
    """Return the pairs (question, images) of a batch.

    Raises:
        PromptError: the value is no list, or holds something else than pairs.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise PromptError(f"questions: found {value!r:.80}; expected a list of pairs: (question, images)")
    pairs = list(value)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise PromptError(f"found the question {pair!r:.80}; expected a pair: (question, images)")
    return [(question, images) for question, images in pairs]


def conversation(question: Any, images: Any) -> list[Message]:
    """Return a question as a conversation: a text with its images before it, or a conversation as it is.

    Raises:
        PromptError: the question is neither, or images are given beside a conversation.
    """
    image_list = _images(images)
    if isinstance(question, str):
        return [Message("user", [*(ImageInput(open_image(image)) for image in image_list), Text(question)])]
    if isinstance(question, bytes | Mapping) or not isinstance(question, Iterable):
        raise PromptError(f"found the question {question!r:.80}; expected a text, or a list of Message.")
    messages = list(question)
    for message in messages:
        if not isinstance(message, Message):
            raise PromptError(
                f"found {message!r:.80} in a conversation; expected Message(role, [Text(...), ...])."
                + _hint(message)
            )
        if isinstance(message.content, str) or not isinstance(message.content, Iterable):
            raise PromptError(
                f"found the content {message.content!r:.80} of a Message; expected a list: [Text(...), ...]."
            )
        for segment in message.content:
            if not isinstance(segment, SEGMENTS):
                raise PromptError(
                    f"found {segment!r:.80} in a Message; expected Text(...), ImageInput(...) or"
                    " ImageTarget(...)."
                )
    if image_list:
        raise PromptError(
            "images of a conversation belong in its messages: put ImageInput(image) where an image goes"
        )
    return messages


def opened_images(value: Any) -> list[Image.Image]:
    """Return images, one or several, opened.

    Raises:
        PromptError: the value is something else.
        ImageError: an image cannot be read.
    """
    return [open_image(image) for image in _images(value)]


def _images(value: Any) -> list[ImageSource]:
    if value is None:
        return []
    if isinstance(value, ImageSource):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise PromptError(
            f"images: found {value!r:.80}; expected a path, the bytes of a file, a PIL image or an array,"
            " or a list of them."
        )
    return list(value)


def _hint(message: Any) -> str:
    if isinstance(message, Mapping) and {"role", "content"} <= set(message):
        return " A mapping of another library becomes Message(role, [Text(content)])."
    return ""
