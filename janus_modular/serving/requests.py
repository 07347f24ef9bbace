"""Requests to an engine, and the events that their jobs yield."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from janus_modular.answers import Answer, Drawings
from janus_modular.arguments import ImageForm
from janus_modular.processing.image_io import ImageSource
from janus_modular.sequence import Message


@dataclass(frozen=True)
class AnswerRequest:
    """A question to answer in text, as by `janus_modular.Janus.chat`."""

    prompt: str | Many[Message]  # a text, or a conversation whose messages may contain images
    images: ImageSource | Many[ImageSource] = ()  # put before a text; () for a conversation
    stop: Many[str] = ()  # strings at which the answer ends, without them
    seed: int | None = None  # None: the sampler's default
    max_new_tokens: int | None = None  # None: the sampler's default
    settings: Mapping[str, Any] = field(default_factory=dict)  # other settings of the text sampler
    deadline: float | None = None  # seconds from submission; None: no limit
    request_id: str | None = None  # None: a random id


@dataclass(frozen=True)
class DrawRequest:
    """Images to draw, as by `janus_modular.Janus.draw`."""

    prompt: str
    n: int = 1  # number of images
    size: tuple[int, int] | None = None  # (height, width) in pixels; None: the model's own
    seed: int | None = None  # None: the sampler's default
    guidance: float | None = None  # None: the sampler's default
    temperature: float | None = None  # None: the sampler's default
    partial_images: int = 0  # number of previews of each image, evenly spaced over its steps
    settings: Mapping[str, Any] = field(default_factory=dict)  # other settings of the image sampler
    images: ImageSource | Many[ImageSource] = ()  # put before the prompt: what is to be changed
    image_form: ImageForm = "input"  # of these images: for the understanding encoder, as codes, or both
    deadline: float | None = None  # seconds from submission; None: no limit
    request_id: str | None = None  # None: a random id


@dataclass(frozen=True)
class TextDelta:
    """The next part of an answer's text."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Progress of a drawing, in steps of all its images."""

    done: int  # steps
    total: int  # steps


@dataclass(frozen=True)
class PartialImage:
    """A preview of an unfinished image: the codes so far, then the last code repeated, decoded."""

    image: Image.Image
    index: int  # of the image in the request, 0 to n - 1
    number: int  # of this preview, 0 to partial_images - 1


@dataclass(frozen=True)
class Timing:
    """Times of a request, in seconds from its submission."""

    started: float  # the request got its first rows
    first: float  # first token or code
    last: float  # last token or code
    finished: float  # end of the request; the images are decoded
    first_steps: int  # number of the batch's steps from submission to the first token or code


@dataclass(frozen=True)
class Finished:
    """The last event: the result, with its usage and the applied settings, and the timing."""

    result: Answer | Drawings
    timing: Timing


Event = TextDelta | Progress | PartialImage | Finished
"""What iteration over a job yields."""
