"""Results of generation: answers with their finish reason, drawings, and token counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from typing import Any, Literal

from numpy.typing import NDArray
from PIL import Image

from janus_modular.processing.streaming import TextStream
from janus_modular.protocols import TextSamplerSettings
from janus_modular.sequence import Sequence

FinishReason = Literal["stop", "length", "context", "sampler", "image"]
"""Why an answer ended: at EOS or a stop string (stop), at max_tokens (length), at the end of the model's
context (context), because the sampler yielded no more tokens (sampler), or where the model began an image
that was not drawn (image)."""


@dataclass(frozen=True)
class Usage:
    """Token counts of a request: positions in the model's context."""

    prompt_tokens: int  # positions of the prompt, images included
    completion_tokens: int = 0  # tokens of the answer, the final token included
    image_tokens: int = 0  # positions of the generated image
    prompt_image_tokens: int = 0  # of prompt_tokens: positions of images

    @property
    def total_tokens(self) -> int:
        """The sum of all positions, of the prompt and generated ones."""
        return self.prompt_tokens + self.completion_tokens + self.image_tokens


def usage_of(prompt: Sequence, *, image_tokens: int = 0) -> Usage:
    """Return the token counts of a prompt, and of the image that is drawn after it."""
    return Usage(len(prompt), image_tokens=image_tokens, prompt_image_tokens=prompt.image_positions)


class Answer(str):
    """The text of an answer: a ``str`` with finish reason, token counts and applied settings."""

    __slots__ = ("finish_reason", "settings", "usage")

    finish_reason: FinishReason | None  # None: the stream has not ended
    usage: Usage
    settings: dict[str, Any]  # all settings: ``chat(question, **answer.settings)`` repeats the answer

    def __new__(
        cls,
        text: str,
        finish_reason: FinishReason | None,
        usage: Usage,
        settings: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Return an answer with this text."""
        answer = super().__new__(cls, text)
        answer.finish_reason, answer.usage, answer.settings = finish_reason, usage, dict(settings or {})
        return answer

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Return the arguments of `__new__` for copying and pickling."""
        return str(self), self.finish_reason, self.usage, self.settings

    @property
    def was_cut(self) -> bool:
        """True if the answer ended at max_tokens or at the end of the context."""
        return self.finish_reason in ("length", "context")


class AnswerRow:
    """A row of a batch of answers: its text, its limit, and its finish reason."""

    def __init__(
        self,
        stream: TextStream,
        settings: TextSamplerSettings,
        *,
        prompt: Sequence,
        context: int,
        begin_image: int | None,
    ) -> None:
        """Begin an answer of up to ``max_tokens``, or of the tokens that remain of the context.

        It ends before an image, which the id ``begin_image`` begins.
        """
        remaining, max_tokens = context - len(prompt), settings.max_tokens
        self.settings = asdict(settings)
        self.stream = stream
        self.prompt_usage = usage_of(prompt)
        self.max_tokens = min(max_tokens, remaining)
        self.cut_reason: FinishReason = "length" if max_tokens <= remaining else "context"
        self.finish_reason: FinishReason | None = None
        self.texts: list[str] = []
        self.ids: list[int] = []  # of the tokens, with the one that ended the answer
        self._begin_image = begin_image

    @property
    def is_active(self) -> bool:
        """True if the row is active."""
        return self.finish_reason is None

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return len(self.ids)

    def push(self, id: int) -> str:
        """Take the next token; return the text that will not change."""
        self.ids.append(id)
        if id == self._begin_image and not self.stream.is_stop(id):
            text = self.stream.finish()
            self.finish_reason = "image"
            self.texts.append(text)
            return text
        text = self.stream.push(id)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif self.tokens >= self.max_tokens:
            text += self.stream.finish()
            self.finish_reason = self.cut_reason
        self.texts.append(text)
        return text

    def end(self) -> str:
        """Note that the sampler yields no more tokens; return the text that was held back."""
        self.finish_reason = "sampler"
        self.texts.append(self.stream.finish())
        return self.texts[-1]

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        usage = replace(self.prompt_usage, completion_tokens=self.tokens)
        return Answer("".join(self.texts).strip(), self.finish_reason, usage, self.settings)


class AnswerBatch(Iterator[tuple[int, str]]):
    """A batch of answers during generation: yields (row, next part of its text)."""

    def __init__(self, rows: Many[AnswerRow], texts: Iterator[tuple[int, str]]) -> None:
        self._rows = rows
        self._texts = texts

    def __next__(self) -> tuple[int, str]:
        return next(self._texts)

    @property
    def answers(self) -> list[Answer]:
        """The answers so far, one for each row; complete once the iteration has ended."""
        return [row.answer for row in self._rows]


class AnswerStream(Iterator[str]):
    """An answer during generation: yields its text in parts."""

    def __init__(self, batch: AnswerBatch) -> None:
        self._batch = batch

    def __next__(self) -> str:
        return next(self._batch)[1]

    def __repr__(self) -> str:
        """Show, in a notebook, how to read the stream."""
        return "AnswerStream(text as it comes: iterate over it; then see .answer)"

    @property
    def answer(self) -> Answer:
        """The answer so far; complete, with its finish reason, once the iteration has ended."""
        [answer] = self._batch.answers
        return answer


class Drawings(list[Image.Image]):
    """A list of generated images, with codes, token counts and settings; a notebook shows it as a grid."""

    def __init__(
        self,
        images: Iterable[Image.Image],
        usage: Many[Usage],
        settings: Mapping[str, Any] | None = None,
        encoded: Many[NDArray[Any]] | None = None,
    ) -> None:
        super().__init__(images)
        self.encoded = encoded  # codes or latents of each image; None: not returned by the sampler
        self.usage = list(usage)  # one per image
        self.settings = dict(settings or {})  # all settings: ``draw(prompt, **settings)`` repeats the drawing

    def grid(self, gap: int = 4) -> Image.Image:
        """Return one image with all images in a nearly square grid, ``gap`` white pixels apart.

        Raises:
            ValueError: there is no image.
        """
        if not self:
            raise ValueError("found no images; expected one at least: an empty list of prompts draws none.")
        columns = int(len(self) ** 0.5 + 0.999)
        rows = -(-len(self) // columns)
        width, height = self[0].size
        canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
        for i, image in enumerate(self):
            canvas.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
        return canvas

    def _repr_png_(self) -> bytes | None:
        """Return the grid as a PNG file, which Jupyter displays; None where there are no images."""
        if not self:
            return None
        file = BytesIO()
        self.grid().save(file, "PNG")
        return file.getvalue()
