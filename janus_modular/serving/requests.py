"""What callers submit to an engine, and the events that they get back."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from janus_modular.answers import Answer, Drawings
from janus_modular.processing.image_io import ImageSource
from janus_modular.sequence import Message


@dataclass(frozen=True)
class AnswerRequest:
    """A question to be answered in text, with the arguments of `janus_modular.Janus.chat`."""

    prompt: str | Many[Message]  # a text, or a conversation with images in its messages
    images: ImageSource | Many[ImageSource] = ()  # that a text is about
    stop: Many[str] = ()  # strings before which the answer ends
    seed: int | None = None  # None: the sampler's default
    max_new_tokens: int | None = None  # None: the sampler's default
    settings: Mapping[str, Any] = field(default_factory=dict)  # the text sampler's others
    deadline: float | None = None  # seconds from submission; None: unlimited
    request_id: str | None = None  # None: a random one


@dataclass(frozen=True)
class DrawRequest:
    """Images to be drawn, with the arguments of `janus_modular.Janus.draw`."""

    prompt: str
    n: int = 1  # images
    size: tuple[int, int] | None = None  # (height, width) in pixels; None: the model's, which has no other
    seed: int | None = None  # None: the sampler's default
    guidance: float | None = None  # None: the sampler's default
    temperature: float | None = None  # None: the sampler's default
    partial_images: int = 0  # of each image while it is drawn, at even steps
    settings: Mapping[str, Any] = field(default_factory=dict)  # the image sampler's others
    deadline: float | None = None  # seconds from submission; None: unlimited
    request_id: str | None = None  # None: a random one


@dataclass(frozen=True)
class TextDelta:
    """Text of an answer that follows the text so far, and will not change."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Steps of a drawing, over all its images."""

    done: int
    total: int


@dataclass(frozen=True)
class PartialImage:
    """An image of a drawing, decoded before it is done: the rest repeats the last code."""

    image: Image.Image
    index: int  # of the image in the request: 0 to n - 1
    number: int  # of this partial image: 0 to partial_images - 1


@dataclass(frozen=True)
class Timing:
    """When parts of a request were done, in seconds after it was submitted."""

    started: float  # its first rows were assigned
    first: float  # its first token or code
    finished: float
    first_steps: int  # steps of the batch from submission to the first token or code


@dataclass(frozen=True)
class Finished:
    """The last event: the result, with the settings that were applied and the usage."""

    result: Answer | Drawings
    timing: Timing


Event = TextDelta | Progress | PartialImage | Finished
"""What iteration over a job yields."""
