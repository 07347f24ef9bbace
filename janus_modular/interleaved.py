"""Replies of text and images, in which the model itself decides when to draw.

The text sampler answers until the model begins an image. The image sampler draws it, behind everything that
came before, and the text sampler answers on behind the image: any two samplers work together, in any runtime.
Around each image the conversation is read again, with the drawn images in the form in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from PIL import Image

from janus_modular import samplers
from janus_modular.answers import AnswerRow, FinishReason, Usage, usage_of
from janus_modular.continuing import with_image, with_tokens
from janus_modular.errors import PromptError
from janus_modular.processing.image_io import to_image
from janus_modular.processing.processor import Processor
from janus_modular.protocols import (
    ImageSampler,
    ImageSamplerSettings,
    Runtime,
    TextSampler,
    TextSamplerSettings,
)
from janus_modular.sequence import ImageTarget, Message, Sequence, Text

if TYPE_CHECKING:
    from janus_modular.sequence import Segment

MAX_IMAGES = 4
"""The default of most images in a reply: a model that is not trained for it may draw on and on."""


@dataclass
class Reply:
    """An assistant's turn of texts and images."""

    parts: list[str | Image.Image] = field(default_factory=list)  # in order; texts without outer whitespace
    encoded: list[NDArray[Any]] = field(default_factory=list)  # of each image: what it was decoded from
    finish_reason: FinishReason | None = None  # None: the stream has not ended
    usage: Usage = field(default_factory=lambda: Usage(0))  # image_tokens: of all images

    @property
    def text(self) -> str:
        """The texts, a blank line between those that images separate."""
        return "\n\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        """The images, in order."""
        return [part for part in self.parts if isinstance(part, Image.Image)]

    @property
    def message(self) -> Message:
        """The turn as a message, to be followed by the user's next; images are in it as they were drawn."""
        encoded = iter(self.encoded)
        content: list[Segment] = [
            Text(part) if isinstance(part, str) else ImageTarget(encoded=next(encoded), supervised=False)
            for part in self.parts
        ]
        return Message("assistant", content)


class ReplyStream(Iterator["str | Image.Image"]):
    """A reply during generation: yields texts as they come, and images once they are drawn."""

    def __init__(self, reply: Reply, parts: Iterator[str | Image.Image]) -> None:
        self.reply = reply  # so far; complete, with its finish reason, once the iteration has ended
        self._parts = parts

    def __next__(self) -> str | Image.Image:
        return next(self._parts)


@dataclass(frozen=True)
class Replying:
    """What replies are generated with."""

    runtime: Runtime
    processor: Processor
    text: tuple[TextSampler[Any], TextSamplerSettings]
    image: tuple[ImageSampler[Any], ImageSamplerSettings]
    stop: Many[str] = ()  # strings before which the reply ends, beside the model's own
    max_images: int = MAX_IMAGES
    progress: Callable[[int, int], None] | bool | None = None  # of each image, as `Janus.draw` takes it

    def stream(self, prompt: Sequence) -> ReplyStream:
        """Return the reply to a prompt, as a stream.

        Raises:
            PromptError: the model cannot begin an image in an answer, or the prompt fills the context.
        """
        begin, end = image_ends(self.processor)
        if len(prompt) >= self.runtime.context:
            raise PromptError(
                f"the prompt has {len(prompt)} positions, the context {self.runtime.context}: shorten it"
            )
        reply = Reply(usage=usage_of(prompt))
        return ReplyStream(reply, self._parts(prompt, reply, begin, end))

    def _parts(self, prompt: Sequence, reply: Reply, begin: int, end: int) -> Iterator[str | Image.Image]:
        """Yield texts and images; note each of them in the reply."""
        remaining = self.text[1].max_tokens
        while True:
            row = AnswerRow(
                self.processor.stream(self.stop),
                replace(self.text[1], max_tokens=remaining),
                prompt=prompt,
                context=self.runtime.context,
                begin_image=begin,
            )
            yield from self._text(prompt, row, reply)
            remaining -= row.tokens
            prompt = with_tokens(prompt, row.ids)  # an image's prompt ends where the image begins
            positions = self._image_tokens
            if row.finish_reason != "image" or len(reply.encoded) == self.max_images:
                reply.finish_reason = row.finish_reason
                return
            if len(prompt) + positions + 1 >= self.runtime.context:
                reply.finish_reason = "context"
                return
            image, encoded = self._draw(prompt, len(reply.encoded))
            reply.parts.append(image)
            reply.encoded.append(encoded)
            reply.usage = replace(reply.usage, image_tokens=reply.usage.image_tokens + positions)
            yield image
            if not remaining:
                reply.finish_reason = "length"
                return
            prompt = with_tokens(with_image(prompt, encoded, positions), [end])

    def _text(self, prompt: Sequence, row: AnswerRow, reply: Reply) -> Iterator[str]:
        """Yield the text up to the next image, or to the reply's end; its noise follows from its number."""
        sampler, settings = self.text
        settings = replace(settings, max_tokens=row.max_tokens, numbers=(len(reply.encoded),))
        session = self.runtime.open(len(prompt) + row.max_tokens)
        before, tokens = list(reply.parts), reply.usage.completion_tokens
        for _, text in samplers.stream_texts(
            self.runtime.text_sampler, sampler(session, [prompt], settings), [row]
        ):
            reply.usage = replace(reply.usage, completion_tokens=tokens + row.tokens)
            reply.parts = [*before, *filter(None, [str(row.answer)])]
            yield text
        reply.usage = replace(reply.usage, completion_tokens=tokens + row.tokens)

    def _draw(self, prompt: Sequence, number: int) -> tuple[Image.Image, NDArray[Any]]:
        """Return image ``number`` of the reply, and what it was decoded from.

        Raises:
            PromptError: the image sampler returns only the image, which no text could follow.
        """
        sampler, settings = self.image
        settings = replace(settings, numbers=(settings.first + number,))
        session = self.runtime.open(len(prompt) + self._image_tokens)
        name = self.runtime.image_sampler
        with samplers.progress_bar(self.progress) as report:
            drawn = samplers.draw_images(name, sampler(session, [prompt], settings), 1, report)
        if drawn.encoded is None:
            raise PromptError(
                f"the image sampler '{name}' returns an image alone; expected janus_modular.EncodedImages,"
                " whose encoded image the text behind it reads"
            )
        return to_image(drawn.images[0]), drawn.encoded[0]

    @property
    def _image_tokens(self) -> int:
        return self.processor.drawing.num_tokens if self.processor.drawing else 0


def image_ends(processor: Processor) -> tuple[int, int]:
    """Return the ids with which the model begins and ends an image.

    Raises:
        PromptError: the model cannot draw, cannot read what it has drawn, or never begins an image itself.
    """
    if processor.drawing is None or processor.encoded is None:
        reason = (
            "it has no generation path"
            if processor.drawing is None
            else "its generation path declares no form of encoded images, so that no text can follow a"
            " drawing (rectified flow), or it is a bundle of an earlier version, to be exported again"
        )
        raise PromptError(
            f"found a model that cannot go on behind a drawing: {reason}. Use chat and draw, each alone."
        )
    begin, end = (processor.tokenizer.special_id(name) for name in ("begin_image", "end_image"))
    if begin is None or end is None or begin in processor.suppressed_ids:
        problem = (
            "a tokenizer without tokens that begin and end an image"
            if begin is None or end is None
            else f"{processor.tokenizer.names['begin_image']!r} among the tokens that answers never contain"
        )
        raise PromptError(
            f"found {problem}; expected a model that begins images itself. Train it on conversations with"
            " drawn images, with learn_image_ends=true."
        )
    return begin, end
